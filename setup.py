"Package metadata, all read from settings.ini: edit that file, not this one."
import re
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
SPDX = {'mit': 'MIT', 'apache2': 'Apache-2.0', 'bsd3': 'BSD-3-Clause'}
STATUS = {'1': '1 - Planning', '2': '2 - Pre-Alpha', '3': '3 - Alpha', '4': '4 - Beta',
          '5': '5 - Production/Stable', '6': '6 - Mature', '7': '7 - Inactive'}
# `NAME_requirements` in settings.ini becomes `pip install golf_nb[NAME]`
EXTRAS = {'dev', 'hub', 'board', 'tables', 'gpt2'}

settings = ConfigParser(delimiters=['='])
settings.read(ROOT/'settings.ini', encoding='utf-8')
facts = settings['DEFAULT']
package = facts['lib_path']

# A package index has no files beside the README: its pictures and pages are named by their addresses there.
source, raw = facts['git_url'] + '/blob/' + facts['branch'], facts['git_url'] + '/raw/' + facts['branch']
page = (ROOT/'README.md').read_text(encoding='utf-8')
page = re.sub(r'(!\[[^\]]*\])\((?!https?:|#)([^)]+)\)', rf'\1({raw}/\2)', page)
page = re.sub(r'(?<!!)(\[[^\]]*\])\((?!https?:|#)([^)]+)\)', rf'\1({source}/\2)', page)

setup(
    name=facts['lib_name'],
    version=facts['version'],
    description=facts['description'],
    long_description=page,
    long_description_content_type='text/markdown',
    author=facts['author'],
    author_email=facts['author_email'],
    url=facts['git_url'],
    license=SPDX[facts['license']],
    keywords=facts['keywords'].split(),
    classifiers=[
        f"Development Status :: {STATUS[facts['status']]}",
        f"Intended Audience :: {facts['audience']}",
        f"Natural Language :: {facts['language']}",
        'Programming Language :: Python :: 3',
    ],
    packages=find_packages(include=[package, f'{package}.*']),
    python_requires=f">={facts['min_python']}",
    install_requires=shlex.split(facts['requirements']),
    extras_require={name: shlex.split(facts[f'{name}_requirements']) for name in sorted(EXTRAS)},
    entry_points={
        'console_scripts': shlex.split(facts['console_scripts']),
        'nbdev': [f'{package}={package}._modidx:d'],   # lets nbdev link `names` in prose to their page
    },
)

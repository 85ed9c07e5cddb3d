"Every picture of the experiments and of a run: labels inside the frame, a sentence as its title."
import sys
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
from reading import ROOT, cells, one_now, run, source

from golf_nb.plots import cut_labels
from golf_nb.presets import PRESETS
from golf_nb.report import draw_schedule
from golf_nb.schedule import SOURCES, SYSTEMS, draw_all
from golf_nb.study.findings import TOO_FEW, VERDICTS, find
from golf_nb.study.grid import read_grid
from golf_nb.study.statistics import CONTRADICTED, NOT_HERE, SUPPORTED, UNDECIDED

FOLDER = ROOT/'nbs'/'experiments'
# E0's table is slow
PAGES = sorted(FOLDER.glob('e[1-9][0-9]_*.ipynb')) + sorted(FOLDER.glob('e0[1-9]_*.ipynb'))


@pytest.fixture
def figures(monkeypatch):
    "Run a page in this process; its figures."
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    def drawn(path):
        names = {}
        with plt.rc_context():
            for cell in cells(path, 'code'): exec(compile(source(cell), path.name, 'exec'), names)
            return [plt.figure(number) for number in plt.get_fignums()]
    plt.close('all')
    yield drawn
    plt.close('all')


@pytest.mark.parametrize('path', one_now(PAGES, *PAGES[:2]), ids=lambda path: path.stem)
def test_pictures_of_a_page(path, figures):
    for figure in figures(path):
        assert cut_labels(figure) == []
        title = figure.get_suptitle().strip()
        assert title and title.split(':')[0].lower() not in (SUPPORTED, CONTRADICTED, UNDECIDED, TOO_FEW)
        assert figure.get_figwidth() == 6, 'text would be too small at 600 pixels'


@pytest.mark.parametrize('name', PRESETS)
def test_schedule_of_a_run(name):
    for scale in PRESETS[name].scales.values():
        figure = draw_schedule(scale.model.schedule, name)
        assert cut_labels(figure) == []
        plt.close(figure)


@pytest.mark.parametrize('number', [1, 2, 4, 5])
def test_schedules_side_by_side(number):
    named = {f'{name} ({SOURCES[name]})': schedule for name, schedule in SYSTEMS.items()}
    figure = draw_all(dict([*named.items()][:number]))
    assert cut_labels(figure) == [] and figure.get_figwidth() < 6.5
    plt.close(figure)


def test_each_verdict_has_its_title():
    "Three sentences or none, all different; and none is a prediction in disguise."
    expects = [expect for path in FOLDER.glob('e[0-9][0-9].json') for expect in read_grid(path)['expect']]
    titled = [expect for expect in expects if 'titles' in expect]
    assert titled
    for expect in titled:
        wanted = {SUPPORTED, CONTRADICTED, UNDECIDED} | ({NOT_HERE} if 'not_here' in expect else set())
        assert set(expect['titles']) == wanted, expect['say']
        sentences = set(expect['titles'].values())
        assert len(sentences) == len(wanted), expect['say']
        assert not any(title.endswith('.') for title in sentences), expect['say']


def test_a_title_follows_the_verdict():
    "Turn the verdict of every prediction around: its title changes."
    for path in FOLDER.glob('e[0-9][0-9].json'):
        for finding in (find(expect, []) for expect in read_grid(path)['expect'] if 'titles' in expect):
            assert len({replace(finding, verdict=verdict).sentence for verdict in VERDICTS[:3]}) == 3
            assert finding.sentence == 'Not run'


def test_decoding_a_file_draws_nothing():
    code = 'import sys, golf_nb.artifact, golf_nb.config; print({"matplotlib", "pandas"} & {*sys.modules})'
    assert run(sys.executable, '-c', code).strip() == 'set()'

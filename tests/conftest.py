"What all tests share."
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]

# No deadline: the first call of anything in torch is slow. In CI the examples are the same at each run.
settings.register_profile('golf_nb', deadline=None, derandomize='CI' in os.environ)
settings.load_profile('golf_nb')


@pytest.fixture(scope='session', autouse=True)
def one_thread():
    "The tests run in parallel processes: threads on top of these only get in each other's way."
    if 'torch' in sys.modules: sys.modules['torch'].set_num_threads(1)


@pytest.fixture(scope='session')
def reference():
    "The folder of the vectors recorded from the five original systems; not every checkout has it."
    path = ROOT.parent/'shared'/'reference'
    if not path.is_dir(): pytest.skip('the recorded vectors are not beside this checkout')
    return path

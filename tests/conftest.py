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
def vectors():
    "The folder of the recorded vectors that every checkout has."
    return ROOT/'tests'/'vectors'


@pytest.fixture
def reference(request, vectors):
    "The folder of all recorded vectors beside this checkout; else `vectors`, if it has the file `name`."
    path = ROOT.parent/'shared'/'reference'
    if path.is_dir(): return path
    params = request.node.callspec.params if hasattr(request.node, 'callspec') else {}
    if (vectors/f'{params.get("name", "none")}.npz').is_file(): return vectors
    pytest.skip('needs vectors that are neither in tests/vectors nor beside this checkout')

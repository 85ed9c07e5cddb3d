"What all tests share."
import os
import signal
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from forked import cpu_seconds
from hypothesis import settings

ROOT = Path(__file__).parents[1]

# A shell lets a command in its background ignore Ctrl-C, and tests are about just that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: the first call of anything in torch is slow. In CI the examples are the same at each run.
settings.register_profile('all', deadline=None, derandomize='CI' in os.environ)
settings.register_profile('some', settings.get_profile('all'), max_examples=30)


def pytest_addoption(parser):
    group = parser.getgroup('golf_nb')
    group.addoption('--all', action='store_true', help='run the tests marked `long` too')
    group.addoption('--cpu', type=int, metavar='N', help='list the N tests that took most CPU time')


def pytest_collection_modifyitems(config, items):
    "Leave out the long proofs, unless asked for all."
    if config.getoption('all'): return
    left = [item for item in items if item.get_closest_marker('long')]
    if left: config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if not item.get_closest_marker('long')]


# --- CPU time: wall time says little where tests run in parallel and other programs run beside them ------

class CpuTimes:
    "Attributes the CPU time of every process of the run to tests, and prints the most expensive."

    def __init__(self, top): self.top, self.last, self.tests, self.outside = top, 0., defaultdict(float), 0.

    def since_last(self):
        "CPU seconds since the last call."
        last, self.last = self.last, cpu_seconds()
        return self.last - last

    def pytest_collection_finish(self): self.outside += self.since_last()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        elsewhere = sum(cpu for name, cpu in item.user_properties if name == 'cpu' and call.when == 'call')
        report.cpu = self.since_last() + elsewhere     # a worker sends it along with the rest
        return report

    def pytest_runtest_logreport(self, report): self.tests[report.nodeid] += report.cpu

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, 'workeroutput'): session.config.workeroutput['outside'] = self.outside

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error):
        self.outside += getattr(node, 'workeroutput', {}).get('outside', 0.)

    def pytest_terminal_summary(self, terminalreporter):
        files = defaultdict(float)
        for test, seconds in self.tests.items(): files[test.split('::')[0]] += seconds
        files['start, imports, collection'] = self.outside
        terminalreporter.section('CPU seconds')
        for table in (self.tests, files):
            for name in sorted(table, key=table.get, reverse=True)[:self.top]:
                terminalreporter.write_line(f'{table[name]:8.1f}  {name}')
            terminalreporter.write_line('')
        terminalreporter.write_line(f'{sum(files.values()):8.1f}  in all')


def pytest_configure(config):
    settings.load_profile('all' if config.getoption('all') else 'some')
    if config.getoption('cpu') is not None: config.pluginmanager.register(CpuTimes(config.getoption('cpu')))


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

"Run notebooks, each in a process of its own that need not import torch: they are forks of one that did."
import contextlib
import io
import os
import resource
from multiprocessing import get_context
from pathlib import Path

# What most notebooks import; nothing of golf_nb, so that each notebook imports the package as a reader would.
PRELOADED = ['torch', 'torch._dynamo', 'matplotlib.pyplot', 'scipy.stats', 'pandas', 'nbdev.test']


def cpu_seconds():
    "CPU seconds of this process and of all its ended children."
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def _run(path, flags, pipe):
    "Run one notebook as `nbdev_test` does, and send whether it ran, what it complained, and its CPU seconds."
    from nbdev.config import get_config
    from nbdev.test import test_nb
    settings = get_config(path=path.parent)
    os.chdir(settings.nbs_path)
    complaint = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(complaint):
        skipped = settings.tst_flags.split()
        ran, _ = test_nb(path, skip_flags=skipped, force_flags=flags, basepath=settings.config_path)
    pipe.send((ran, complaint.getvalue(), cpu_seconds()))


def run_notebook(path: Path, flags=()):
    """Run the notebook at `path` in a fork: did it run, what it complained, and its CPU seconds.

    Cells with one of the test `flags`, such as `slow`, run too.
    """
    context = get_context('forkserver')
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(path, flags, theirs))
    process.start()
    theirs.close()
    try: return ours.recv()
    except EOFError: return False, f'{path.name}: its process ended without a word', 0.
    finally:
        process.join()
        ours.close()

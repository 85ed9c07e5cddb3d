"""`python -m golf_nb.train` with a disturbance that comes from inside, so that no busy machine can delay it.

The environment says which: DISTURB is `kill <seed>`, `stop`, `disk`, or `die`. Used by tests.
"""
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

from golf_nb import trainer
from golf_nb.console import run, take_over
from golf_nb.train import main

begins, add, train_step = [], trainer.Log.add, trainer.train_step
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)


def kill(seed):
    "After the second step, let the kernel end the process within twice the CPU time of a step."
    if len(begins) != 2: return
    seconds = 2*random.Random(int(seed)).random()*(begins[1] - begins[0])
    # Nothing handles this signal: like kill -9, it ends the process wherever it is; but it counts CPU time.
    signal.setitimer(signal.ITIMER_PROF, max(seconds, 1e-4))


def stop():
    "Ask the process to stop after its first step."
    if len(begins) == 1: os.kill(os.getpid(), signal.SIGTERM)


def disk():
    "Make room on the full disk after the fifth step."
    if len(begins) == 5: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def die(run):
    "Kill the second process when it begins its fourth step; once."
    train_step(run)
    if run.step != 3 or run.process.first or Path('died').exists(): return
    Path('died').touch()
    os.kill(os.getpid(), signal.SIGKILL)


def logged(log, line):
    "Write a line of the log, then disturb."
    add(log, line)
    begins.append(time.process_time())
    {'kill': kill, 'stop': stop, 'disk': disk}[what](*words)


what, *words = os.environ['DISTURB'].split()
take_over()
# No file may grow beyond 200 kB.
if what == 'disk': resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
if what == 'die': trainer.train_step = die
else: trainer.Log.add = logged
run(lambda: main(sys.argv[1:]))

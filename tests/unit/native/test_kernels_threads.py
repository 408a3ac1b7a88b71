"""The pool of threads: idle when idle, more threads than processors, after a fork, under a narrowed affinity mask."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from packed_matrices import Maker

native = pytest.importorskip("quern._native", reason="the native part is not built")

TESTS = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def weight():
    packed = Maker(40).integer8(2000, 256)
    arrays = {name: array.reshape(-1).view(np.uint8) for name, array in packed.arrays.items()}
    return native.Matrix(**packed.keywords(), **arrays)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(41).standard_normal((2, 256)).astype(np.float32)


def test_many_short_jobs_with_more_threads_than_processors(weight, x):
    expected = native.multiply(weight, x, 1)
    for threads in (2, 16, 5):
        for _ in range(300):
            np.testing.assert_array_equal(native.multiply(weight, x, threads), expected)


def test_idle_threads_do_not_use_processors(weight, x):
    native.multiply(weight, x, 4)
    time.sleep(0.05)  # longer than they spin
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1


def test_calls_from_several_threads_take_turns(weight, x):
    expected, failures = native.multiply(weight, x, 1), []

    def work(threads):
        for _ in range(100):
            if not np.array_equal(native.multiply(weight, x, threads), expected):
                failures.append(threads)

    workers = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


FORK = """
import os, sys
import numpy as np
from packed_matrices import Maker
from quern import _native as native
packed = Maker(42).integer8(500, 256)
weight = native.Matrix(**packed.keywords(), **{n: a.reshape(-1).view(np.uint8) for n, a in packed.arrays.items()})
x = np.ones((1, 256), np.float32)
expected = native.multiply(weight, x, 3)
child = os.fork()
if child == 0:
    same = all(np.array_equal(native.multiply(weight, x, n), expected) for n in (3, 3, 2))
    os._exit(0 if same else 3)
assert os.waitpid(child, 0)[1] == 0
assert np.array_equal(native.multiply(weight, x, 3), expected)
"""

MASK = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from quern import _native as native
import numpy as np
before = len(os.listdir("/proc/self/task"))
native.rotate(np.ones((64, 1024), np.float32), np.zeros(128, np.uint8))
assert len(os.listdir("/proc/self/task")) == before, "one processor needs no worker"
"""


@pytest.mark.parametrize("program", [FORK, MASK], ids=["fork", "mask"])
def test_in_a_process_of_its_own(program):
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-2000:]

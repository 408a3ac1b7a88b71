"""Kernels stay inside their buffers: an artifact is mapped into memory, and its last tensor may end where a page does.

Every array is put right before, and right after, a page that may not be touched; in a process of its own, since a kernel
that does not stay inside ends it. ``tools/sanitize.sh`` runs this folder under AddressSanitizer and
UndefinedBehaviorSanitizer.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

native = pytest.importorskip("quern._native", reason="the native part is not built")

TESTS = Path(__file__).parents[2]

PROGRAM = """
import ctypes, mmap, sys
import numpy as np
from packed_matrices import AFFINE, POINTS, SUPERBLOCKS, Maker
from quern import _native as native

PAGE, NONE, BOTH = mmap.PAGESIZE, 0, 3
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def fenced(array, at_end):
    "A copy of `array` that ends (or begins) at a page that may not be touched."
    array = np.ascontiguousarray(array)
    pages = -(-array.nbytes // PAGE)
    start = libc.mmap(None, (pages + 2) * PAGE, BOTH, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert start not in (None, ctypes.c_void_p(-1).value)
    for fence in (start, start + (pages + 1) * PAGE):
        assert libc.mprotect(fence, PAGE, NONE) == 0
    address = start + PAGE + (pages * PAGE - array.nbytes if at_end else 0)
    memory = (ctypes.c_ubyte * array.nbytes).from_address(address)
    copy = np.frombuffer(memory, np.uint8).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def matrix(packed, at_end):
    arrays = {}
    for name, array in packed.arrays.items():
        kind = np.int8 if name == "table" else np.uint8
        arrays[name] = fenced(np.ascontiguousarray(array).reshape(-1).view(kind), at_end)
    return native.Matrix(**packed.keywords(), **arrays)


def cases():
    maker = Maker(30)
    for rows, columns in ((1, 1), (3, 17), (17, 130), (33, 515), (256, 64), (300, 100)):
        yield maker.integer4(rows, columns)
        yield maker.integer4(rows, columns, zeros=True, one_scale=True)
        yield maker.codebook4(rows, columns)
        yield maker.integer8(rows, columns)
        yield maker.plain("bfloat16", rows, columns)
        yield maker.plain("float32", rows, columns)
        yield maker.trellis(rows, columns, 2, 7)
        yield maker.trellis(rows, columns, 3, 6, 2, 2)
        yield maker.trellis(rows, columns, 4, 7, 2, 1, fits=False)
    for rows, columns, group in ((5, 2048, 128), (9, 1100, 64), (18, 600, 32), (7, 300, 20), (3, 90, 7)):
        yield maker.integer4(rows, columns, group, zeros=True)
        yield maker.codebook4(rows, columns, group)
        yield maker.integer8(rows, columns, group)
    for kind in SUPERBLOCKS:
        yield maker.superblocks(kind, 1, 256)
        yield maker.superblocks(kind, 18, 768)
    for kind in AFFINE:
        yield maker.affine_blocks(kind, 1, 32)
        yield maker.affine_blocks(kind, 18, 288)
    for kind in POINTS:
        yield maker.points(kind, 1, 256)
        yield maker.points(kind, 18, 768)


native.use_isa(sys.argv[1])
count = 0
for packed in cases():
    for at_end in (True, False):
        weight = matrix(packed, at_end)
        for tokens in (1, 2, 8, 9, 33):
            x = np.random.default_rng(tokens).standard_normal((tokens, packed.columns)).astype(np.float32)
            found = native.multiply(weight, fenced(x, at_end), 1)
            np.testing.assert_array_equal(found, packed.product(x))
            count += 1
        x = fenced(np.ones((2, packed.columns), np.float32), at_end)
        native.rotate(x, fenced(np.zeros(-(-packed.columns // 8), np.uint8), at_end), 1)
    native.time_read([fenced(np.ones(packed.columns, np.uint8), True)], 1, 1)
print(count)
if sys.argv[2:]:  # the fence itself: this must not be survived
    print(fenced(np.zeros(8, np.uint8), True).ctypes.data_as(ctypes.POINTER(ctypes.c_ubyte))[8])
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("isa", native.isas())
def test_nothing_is_read_outside_of_the_arrays(isa):
    done = run(isa)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 600


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer answers the signal itself")
def test_the_fence_is_there():
    assert run(native.isas()[0], "touch").returncode == -signal.SIGSEGV

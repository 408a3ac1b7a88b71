"""The CPU engine where memory is short: what fits is told, and what the system refuses does not end the process."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from tiny_model import tiny_config, write_model

from quern.core.errors import UserError
from quern.engines.cpu import CpuEngine
from quern.generation.generate import generate

TESTS = Path(__file__).parents[1]
EACH = 2 * 2 * 3 * 2 * 16  # keys and values x float16 x layers x heads x head_dim


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny_config(torch_dtype="float32", eos_token_id=None)
    return write_model(tmp_path_factory.mktemp("cpu") / "model", config)


@pytest.fixture
def room(monkeypatch):
    """Free memory for so many tokens of cache."""

    def give(tokens):
        memory = psutil.virtual_memory()._replace(available=int(EACH * (tokens + 0.5) / 0.9))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    return give


def load(path, **options):
    return CpuEngine().load(path, threads=1, **options)


@pytest.mark.parametrize(
    ("fits", "capacity"), [(16, 16), (50, 48), (63, 48), (64, 64), (127, 112), (128, 128), (999, 128)]
)
def test_the_number_told_is_the_capacity(model, room, fits, capacity):
    room(fits)
    session = load(model).start()
    assert session.capacity == capacity
    session.feed([1] * capacity)
    told = f"the free memory has room for {capacity} tokens of context" if capacity < 128 else "context is 128"
    with pytest.raises(UserError, match=rf"{capacity + 1} tokens do not fit: .*{told}"):
        session.feed([1])


def test_sequences_share_the_room(model, room):
    """100 tokens are six pages of 16."""
    room(100)
    loaded = load(model)
    first, second = loaded.open(), loaded.open()
    loaded.step([(first, [1] * 17), (second, [1] * 60)])
    assert (first.capacity, second.capacity) == (32, 64)
    assert first.limit == "the free memory has room for 32 tokens of context beside 1 other sequence"
    with pytest.raises(UserError, match=r"33 tokens do not fit: the free memory has room for 32 tokens of .*Shorten"):
        loaded.step([(first, [1] * 16)])
    second.rewind(48)  # three pages, and so one is free
    assert first.capacity == 48
    with pytest.raises(UserError, match=r"49 tokens do not fit: .* 48 tokens"):
        loaded.step([(first, [1] * 16), (second, [1])])  # each alone would fit
    assert (first.length, second.length, first.capacity) == (17, 48, 48), "nothing was taken"
    loaded.step([(first, [1] * 16)])
    second.close()
    assert first.capacity == 96
    assert first.limit == "the free memory has room for 96 tokens of context"
    with pytest.raises(UserError, match="the sequence is closed; open another one"):
        loaded.step([(second, [1])])


def test_the_pool_is_planned_again_when_no_sequence_is_open(model, room):
    room(50)
    loaded = load(model)
    session = loaded.start()
    room(999)
    assert session.capacity == loaded.start().capacity == 48
    del session
    assert loaded.start().capacity == 128


def test_no_room_at_all(model, room):
    room(15)
    with pytest.raises(UserError, match="the free memory has room for 0 tokens"):
        load(model).start()


def test_generation_ends_where_memory_does(model, room):
    prompt = "~" * 30  # one token each
    expected = "".join(generate(model, prompt, max_tokens=18))
    assert expected != "".join(generate(model, prompt, max_tokens=17))
    room(50)
    assert "".join(generate(model, prompt, max_tokens=1000)) == expected


def test_a_prompt_that_memory_does_not_hold_is_refused_before_the_first_piece(model, room):
    room(50)
    for length in (48, 60):
        with pytest.raises(UserError, match=rf"{length} tokens.* the free memory has room for 48 tokens of context"):
            generate(model, "~" * length)


def test_logits_say_what_fits(model, room):
    loaded = load(model)
    with pytest.raises(UserError, match=r"129 tokens do not fit: this model's context is 128"):
        loaded.logits(torch.ones(1, 129, dtype=torch.int64))
    assert loaded.logits(torch.ones(2, 0, dtype=torch.int64)).shape == (2, 0, 300)
    room(50)
    assert loaded.logits(torch.ones(1, 48, dtype=torch.int64)).shape == (1, 48, 300)
    said = r"a key/value cache of 49 tokens takes 18.8 kB; the free memory has room for 48 tokens"
    with pytest.raises(UserError, match=said):
        loaded.logits(torch.ones(1, 49, dtype=torch.int64))


def test_the_engine_asks_for_that_limit(model, monkeypatch):
    import quern.engines._cpu_pool as pool

    monkeypatch.setattr(pool, "free_memory", lambda: int(EACH * 50.5 / 0.9))
    assert load(model).start().capacity == 48


# The address space is the one memory that a process can be refused; huge contexts ask for much of it and touch nothing.
REFUSED = """
import json, os, resource, sys
from pathlib import Path
import torch
import quern.engines._cpu_pool as pool
from quern.core.errors import UserError
from quern.engines.cpu import CpuEngine

pool.free_memory = lambda: 1 << 20  # so that its pool's addresses do not count
loaded = CpuEngine().load(sys.argv[1], threads=1)
loaded.logits(torch.ones(1, 5, dtype=torch.int64))
pool.free_memory = lambda: 1 << 60
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), resource.RLIM_INFINITY))
session = loaded.start()
print(session.capacity, session.limit)
session.feed([1, 2, 3])
try:
    session.feed([1] * (1 << 22))
except UserError as error:
    print(error)
"""

# Each thread of a product wants some MiB of its own; under one limit or another the caller's, a worker's or both are
# refused, and afterwards everything goes on.
SCRATCH = """
import resource
from pathlib import Path
import numpy as np
from packed_matrices import Maker
from quern import _native as native

packed = Maker(7).integer4(16, 1 << 15, 4)
weight = native.Matrix(**packed.keywords(), **{n: a.reshape(-1).view(np.uint8) for n, a in packed.arrays.items()})
small = native.Matrix("float32", 2, 4, np.zeros(32, np.uint8))
x = np.random.default_rng(1).standard_normal((256, 1 << 15)).astype(np.float32)
refused = 0
for extra in range(32, 200, 2):
    native.multiply(small, np.ones((1, 4), np.float32), 1)
    native.multiply(small, np.ones((1, 4), np.float32), 4)  # new workers, without memory of their own
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (extra << 20), resource.RLIM_INFINITY))
    try:
        native.multiply(weight, x, 4)
    except MemoryError:
        refused += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
expected = native.multiply(weight, x, 1)
assert np.array_equal(native.multiply(weight, x, 4), expected)
print(refused)
"""


def in_a_process_of_its_own(program, *arguments):
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


needs_addresses = pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="it takes all addresses")


@needs_addresses
def test_a_cache_that_the_system_refuses_says_how_much_fits(tmp_path):
    config = tiny_config(torch_dtype="float32", max_position_embeddings=1 << 22)
    folder = write_model(tmp_path / "model", config)
    first, second = in_a_process_of_its_own(REFUSED, folder)
    capacity = int(first.split()[0])
    # Halving from what was asked for: at least half of what there is, of which a tenth stays free.
    assert 0.4 * (1 << 28) <= capacity * EACH <= 1 << 28
    assert first == f"{capacity} the system gives memory for {capacity} tokens of context"
    assert second == (
        f"{(1 << 22) + 3} tokens do not fit: the system gives memory for {capacity} tokens of context. Shorten the prompt"
    )


@needs_addresses
def test_threads_without_memory_are_an_error_and_not_the_end():
    (refused,) = in_a_process_of_its_own(SCRATCH)
    assert int(refused) > 0


def test_a_step_without_memory_is_a_users_error(model, monkeypatch):
    loaded = load(model)

    class Full:
        def __getattr__(self, name):
            return getattr(decoder, name)

        def feed(self, *arguments):
            raise MemoryError

        read = feed

    decoder = loaded._decoder
    monkeypatch.setattr(loaded, "_decoder", Full())
    with pytest.raises(UserError, match="the system gives no memory to compute 3 tokens"):
        loaded.start().feed([1, 2, 3])

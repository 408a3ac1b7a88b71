"""Texts that grow beside each other are those that each would be alone."""

import pytest
from tiny_model import tiny_config, write_model

from quern.core.errors import UserError
from quern.core.seeds import derive_seed
from quern.engines.cpu import CpuEngine
from quern.generation import batch
from quern.generation.generate import continuation
from quern.generation.sampling import Sampler, SamplingOptions

SAMPLED = SamplingOptions(temperature=1.5)
BEGINNINGS = [[1 + number, 7, 3][: 1 + number % 3] for number in range(9)]
COUNTS = [4 + number % 5 for number in range(9)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny_config(torch_dtype="float32", eos_token_id=None)
    return CpuEngine().load(write_model(tmp_path_factory.mktemp("batch") / "model", config), threads=1)


def alone(model, number, ends=frozenset()):
    """By the plain loop; with the token that ends it."""
    sampler = Sampler(SAMPLED, derive_seed(5, "continuation", number))
    session, given, written = model.start(), BEGINNINGS[number], []
    while len(written) < COUNTS[number] and not (written and written[-1] in ends):
        (token,) = continuation(session, given, 1, sampler, frozenset())
        written.append(token)
        given = [token]
    return written


@pytest.mark.parametrize("parallel", [1, 4, 16])
def test_texts_are_those_of_one_at_a_time(model, parallel, monkeypatch):
    monkeypatch.setattr(batch, "PARALLEL", parallel)
    found = list(batch.continuations(model, BEGINNINGS, COUNTS, SAMPLED, frozenset(), 5))
    assert found == [alone(model, number) for number in range(9)]


def test_a_run_goes_on_where_another_stopped(model):
    whole = list(batch.continuations(model, BEGINNINGS, COUNTS, SAMPLED, frozenset(), 5))
    assert list(batch.continuations(model, BEGINNINGS, COUNTS, SAMPLED, frozenset(), 5, first=4)) == whole[4:]


def test_an_end_is_the_last_token(model):
    free = [alone(model, number) for number in range(9)]
    ends = frozenset({free[2][1], free[7][0]})
    found = list(batch.continuations(model, BEGINNINGS, COUNTS, SAMPLED, ends, 5))
    assert found == [alone(model, number, ends) for number in range(9)]
    assert found[7] == free[7][:1]


class Crowded:
    """A model whose pool has room for two texts."""

    def __init__(self, model, room):
        self.model, self.room, self.fullest = model, room, 0

    def open(self):
        return self.model.open()

    def step(self, steps):
        if len(steps) > self.room:
            raise UserError("no room")
        self.fullest = max(self.fullest, len(steps))
        return self.model.step(steps)


def test_fewer_grow_where_memory_has_no_room(model):
    crowded = Crowded(model, 2)
    found = list(batch.continuations(crowded, BEGINNINGS, COUNTS, SAMPLED, frozenset(), 5))
    assert found == [alone(model, number) for number in range(9)]
    assert crowded.fullest == 2
    with pytest.raises(UserError, match="no room"):
        list(batch.continuations(Crowded(model, 0), BEGINNINGS, COUNTS, SAMPLED, frozenset(), 5))

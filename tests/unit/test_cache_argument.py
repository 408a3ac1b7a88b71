"""The name of transformers' key/value cache, whichever transformers is installed."""

import functools
import warnings

import pytest
import torch

from quern.core.engine import cache_argument
from quern.engines.base import ENGINES
from quern.peers.transformers_model import TransformersModel


def renamed(function):
    """A decorator as transformers' own: what it wraps has the signature."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Older:
    def forward(self, input_ids=None, past_key_values=None, **kwargs): ...


class Newer:
    @renamed
    def forward(self, input_ids=None, cache=None, **kwargs): ...


@pytest.mark.parametrize(("model", "name"), [(Older(), "past_key_values"), (Newer(), "cache")])
def test_the_name_is_the_one_in_the_signature(model, name):
    assert cache_argument(model) == name


@pytest.mark.parametrize("wrapped", [False, True], ids=["engine", "peer"])
def test_no_session_uses_a_name_that_is_deprecated(tiny_model, wrapped):
    """Nor loses the cache: token by token, logits are those of the whole prompt."""
    loaded = ENGINES.get("reference")().load(tiny_model, dtype="float32")
    expected = loaded.logits(torch.tensor([[3, 1, 4, 1]]))[0, -1]
    session = (TransformersModel(loaded.model) if wrapped else loaded).start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for token in (3, 1, 4, 1):
            logits = session.feed([token])
    # Other shapes, another order of float32 sums: some hundred terms, each rounded by 2^-24 of it.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)

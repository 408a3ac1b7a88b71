"""The adapter to lm-eval, against plain sums; with the real package where it is installed."""

import importlib.util
import itertools
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from fake_model import CONTEXT, FakeModel, FakeTokenizer, bigram_table

from quern.core.errors import UserError
from quern.evaluation.lm_eval import Requests, language_model


@pytest.fixture
def model():
    return FakeModel(bigram_table())


def ask(*arguments):
    return [SimpleNamespace(args=item) for item in arguments]


def encode(text):
    return FakeTokenizer().encode(text, add_special_tokens=False)


def likelihood(model, ids):
    """Sum of log p(next | last) over the bigrams of ``ids``."""
    log_p = torch.log_softmax(model.table.double(), -1)
    return sum(float(log_p[a, b]) for a, b in itertools.pairwise(ids))


@pytest.mark.parametrize("adds_bos", [True, False])
def test_loglikelihood(model, adds_bos):
    answers = Requests(model, FakeTokenizer(adds_bos=adds_bos)).loglikelihood(
        ask(("the cat", "sat on"), ("a", "b"), ("the cat ", "sat"), ("", "abc"))
    )
    expected = [
        likelihood(model, [encode("t")[0], *encode("sat on")]),
        likelihood(model, encode("ab")),
        likelihood(model, [encode("t")[0], *encode(" sat")]),
        likelihood(model, [0, *encode("abc")]),
    ]
    assert [answer[0] for answer in answers] == pytest.approx(expected, rel=1e-12)
    assert not any(answer[1] for answer in answers)


def test_greedy_is_recognised(model):
    for a, b in zip("abc", "bcd"):
        model.table[encode(a)[0], encode(b)[0]] = 30.0
    answers = Requests(model, FakeTokenizer()).loglikelihood(ask(("a", "bcd"), ("a", "bcx")))
    assert [greedy for _, greedy in answers] == [True, False]


def test_a_long_context_loses_its_beginning(model):
    ((value, _),) = Requests(model, FakeTokenizer()).loglikelihood(ask(("x" * 500, "ab")))
    assert value == pytest.approx(likelihood(model, encode("xab")), rel=1e-12)
    assert model.batches == [(1, CONTEXT)]
    with pytest.raises(UserError, match="a continuation has 65 tokens"):
        Requests(model, FakeTokenizer()).loglikelihood(ask(("x", "a" * 65)))


@pytest.mark.parametrize("length", [1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 3 * CONTEXT])
def test_rolling_scores_every_token_once(model, length):
    text = ("the quick brown fox " * 20)[:length]
    answers = Requests(model, FakeTokenizer()).loglikelihood_rolling(ask((text,), (text,)))
    assert answers == pytest.approx([likelihood(model, [0, *encode(text)])] * 2, rel=1e-12)


def test_generation_stops_before_the_stop_string(model):
    table = torch.full_like(model.table, -10.0)
    for a, b in zip("abcdefg", "bcdefga"):
        table[encode(a)[0], encode(b)[0]] = 10.0
    model.table = table
    adapter = Requests(model, FakeTokenizer())
    assert adapter.generate_until(ask(("xa", {"until": ["ef", "fg"], "max_gen_toks": 20}))) == ["bcd"]
    assert adapter.generate_until(ask(("xa", {"until": "c", "max_gen_toks": 20}))) == ["b"]
    assert adapter.generate_until(ask(("xa", {"until": [], "max_gen_toks": 3}))) == ["bcd"]
    assert [len(text) for text in adapter.generate_until(ask(("xa", {"until": []})))] == [CONTEXT // 2]


def test_generation_ends_at_the_end_of_the_text(model):
    table = torch.full_like(model.table, -10.0)
    table[encode("a")[0], encode("b")[0]] = table[encode("b")[0], 1] = 10.0
    model.table = table
    assert Requests(model, FakeTokenizer()).generate_until(ask(("a", {"max_gen_toks": 9}))) == ["b"]


def test_requests_that_cannot_be_answered(model):
    adapter = Requests(model, FakeTokenizer())
    for arguments in ({"do_sample": True}, {"temperature": 0.7}):
        with pytest.raises(UserError, match="sampling"):
            adapter.generate_until(ask(("a", arguments)))
    with pytest.raises(UserError, match="max_gen_toks 64 leaves no room"):
        adapter.generate_until(ask(("a", {"max_gen_toks": CONTEXT})))
    with pytest.raises(UserError, match="neither"):
        Requests(model, FakeTokenizer(adds_bos=False, bos=None, eos=None))


def test_not_installed(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'quern\[lm-eval\]'"):
        language_model(model, FakeTokenizer())


def test_it_is_one_of_lm_evals_models(model, monkeypatch):
    class LM:
        def __init__(self):
            self.ready = True

    package, api, module = (types.ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"))
    module.LM = LM
    for loaded in (package, api, module):
        monkeypatch.setitem(sys.modules, loaded.__name__, loaded)
    adapter = language_model(model, FakeTokenizer())
    assert isinstance(adapter, LM)
    assert adapter.ready
    assert len(adapter.loglikelihood(ask(("a", "b")))) == 1


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_with_the_real_package(model):
    from lm_eval.api.model import LM

    assert isinstance(language_model(model, FakeTokenizer()), LM)

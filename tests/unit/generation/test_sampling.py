"""Choosing tokens: the options one by one, and the distribution that comes out."""

import math

import numpy as np
import pytest

from quern import _native
from quern.core.errors import QuernError, UserError
from quern.generation.sampling import Sampler, SamplingOptions, candidates, choose_plainly

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], dtype=np.float32))


def allowed(**options):
    tokens, probabilities = candidates(LOGITS, SamplingOptions(**options))
    return tokens.tolist(), probabilities


def test_without_limits_every_token_keeps_its_probability():
    tokens, probabilities = allowed(temperature=1.0)
    assert tokens == [1, 3, 2, 0]
    # float32 logits carry 2^-24 relative error in the logarithm, which is at most |log 0.1| = 2.4 in size.
    np.testing.assert_allclose(probabilities, [0.4, 0.3, 0.2, 0.1], rtol=4 * 2.0**-24 * 2.4)


def test_temperature_is_a_power_of_the_probabilities():
    _, probabilities = allowed(temperature=0.5)
    squares = np.array([0.16, 0.09, 0.04, 0.01])
    np.testing.assert_allclose(probabilities, squares / squares.sum(), rtol=8 * 2.0**-24 * 2.4)


@pytest.mark.parametrize(
    ("k", "tokens"), [(1, [1]), (2, [1, 3]), (4, [1, 3, 2, 0]), (9, [1, 3, 2, 0]), (0, [1, 3, 2, 0])]
)
def test_top_k(k, tokens):
    assert allowed(temperature=1.0, top_k=k)[0] == tokens


@pytest.mark.parametrize(
    ("p", "tokens"), [(0.01, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 3, 2]), (1.0, [1, 3, 2, 0])]
)
def test_top_p_is_the_smallest_set_that_reaches_it(p, tokens):
    found, probabilities = allowed(temperature=1.0, top_p=p)
    assert found == tokens
    assert math.isclose(probabilities.sum(), 1)


def test_top_p_counts_what_top_k_left():
    assert allowed(temperature=1.0, top_k=2, top_p=0.56)[0] == [1]  # 0.4 / 0.7 = 0.571 reaches it
    assert allowed(temperature=1.0, top_k=2, top_p=0.58)[0] == [1, 3]


@pytest.mark.parametrize("k", [5, 2**31, 3_000_000_000, 2**70])
def test_more_than_all_tokens_are_all_tokens(k):
    def chosen(top_k):
        sampler = Sampler(SamplingOptions(temperature=1.0, top_k=top_k), 3)
        return [sampler.choose(LOGITS) for _ in range(20)]

    assert chosen(k) == chosen(0)


def test_ties_go_to_the_lower_token():
    logits = np.zeros(5, dtype=np.float32)
    assert Sampler(SamplingOptions(), 0).choose(logits) == 0
    assert candidates(logits, SamplingOptions(temperature=1.0, top_k=3))[0].tolist() == [0, 1, 2]


def test_temperature_zero_takes_the_likeliest_whatever_the_seed():
    assert {Sampler(SamplingOptions(), seed).choose(LOGITS) for seed in range(20)} == {1}


@pytest.mark.parametrize("temperature", [1e-300, 1e-6])
def test_a_tiny_temperature_is_nearly_that(temperature):
    assert Sampler(SamplingOptions(temperature=temperature), 0).choose(LOGITS) == 1


def test_same_seed_same_tokens():
    def draw(seed):
        sampler = Sampler(SamplingOptions(temperature=1.0), seed)
        return [sampler.choose(LOGITS) for _ in range(50)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_frequencies_are_the_probabilities():
    sampler = Sampler(SamplingOptions(temperature=1.0), 7)
    count = 4000
    drawn = np.bincount([sampler.choose(LOGITS) for _ in range(count)], minlength=4) / count
    expected = np.array([0.1, 0.4, 0.2, 0.3])
    # Five standard deviations of a binomial share.
    assert (np.abs(drawn - expected) < 5 * np.sqrt(expected * (1 - expected) / count)).all()


def test_tokens_ruled_out_by_the_model_are_never_chosen():
    logits = np.array([-np.inf, 0.0, -np.inf], dtype=np.float32)
    sampler = Sampler(SamplingOptions(temperature=2.0), 0)
    assert {sampler.choose(logits) for _ in range(100)} == {1}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_refused(bad, temperature):
    with pytest.raises(QuernError, match="NaN or infinite"):
        Sampler(SamplingOptions(temperature=temperature), 0).choose(np.array([0.0, bad], dtype=np.float32))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
    ],
)
def test_options_out_of_range_are_refused_by_name(options):
    with pytest.raises(UserError, match=next(iter(options))):
        SamplingOptions(**options)


@pytest.mark.parametrize("options", [
    {}, {"top_k": 1}, {"top_k": 40}, {"top_p": 0.9}, {"top_p": 0.01}, {"top_k": 300, "top_p": 0.5}, {"top_k": 5000},
])  # fmt: skip
@pytest.mark.parametrize("temperature", [0.1, 1.0, 30.0])
def test_the_native_sampler_is_the_plain_one(options, temperature):
    """Places well inside a token's share: at a border, sums in another order may fall on the other side."""
    generator = np.random.default_rng(7)
    for size in (1, 2, 300, 3000):
        logits = generator.normal(0, 4, size).astype(np.float32)
        logits[generator.integers(0, size, size // 3)] = logits[0]  # ties
        chosen = SamplingOptions(temperature=temperature, **options)
        probabilities = candidates(logits, chosen)[1]
        borders = np.cumsum(probabilities)
        for place in generator.random(30):
            if np.abs(borders - place).min() > 1e-9:
                found = _native.sample(logits, temperature, chosen.top_k, chosen.top_p, place)
                assert found == choose_plainly(logits, chosen, place)
        assert _native.likeliest(logits) == choose_plainly(logits, SamplingOptions(), 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_native_sampler_refuses_what_is_no_number(bad):
    logits = np.array([0.0, bad, 1.0], np.float32)
    assert _native.likeliest(logits) == -1
    assert _native.sample(logits, 1.0, 0, 1.0, 0.5) == -1
    with pytest.raises(QuernError, match="NaN or infinite"):
        Sampler(SamplingOptions(), 0).choose(logits)

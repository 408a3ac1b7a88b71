"""What accuracy and size mean, the same everywhere: divergence, perplexity, agreement, noise, bits, intervals.

Logits are ``(tokens, vocabulary)``, any float dtype; every sum runs in float64. Nothing here returns a number for input
that has none: empty arrays, NaN, infinity and shapes that do not fit raise ``MetricError``. ``docs/results.md`` states
the rules; a change of one of them is a new ``METRICS_VERSION``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quern.core.errors import UserError
from quern.core.seeds import generator

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Truths = NDArray[np.bool_]

RESAMPLES = 10_000
"""Bootstrap resamples behind an interval: the 2.5 % quantile then moves by about 0.03 standard errors between seeds."""
CONFIDENCE = 0.95

_BLOCK = 1 << 21
"""Logits turned into float64 at a time, so that a vocabulary of 150,000 does not double the memory of the logits."""


class MetricError(UserError):
    """What was given has no such statistic."""


class NonFiniteError(MetricError):
    """There is NaN or infinity in what was given."""


class Estimate(NamedTuple):
    """A mean and its 95 % interval; no interval where a single document or item gives none."""

    mean: float
    interval: tuple[float, float] | None


class Summary(NamedTuple):
    """Repeated timings of one thing."""

    median: float
    low: float
    high: float
    rounds: int


def divergence_per_token(reference: ArrayLike, logits: ArrayLike) -> Floats:
    """KL(reference || model) of each token, in nats; both ``(tokens, vocabulary)``, result ``(tokens,)``.

    Kullback and Leibler (1951): sum over the vocabulary of p (log p - log q), p the reference. Never negative: what
    float64 rounding leaves below 0 (about 1e-15) is 0.
    """
    p_logits, q_logits = _pair(reference, logits)
    result = np.empty(len(p_logits))
    for rows in _blocks(p_logits.shape):
        log_p, log_q = _log_softmax(p_logits[rows]), _log_softmax(q_logits[rows])
        log_q -= log_p
        result[rows] = -np.einsum("tv,tv->t", np.exp(log_p), log_q)
    return np.maximum(result, 0.0)


def mean_divergence(reference: ArrayLike, logits: ArrayLike) -> float:
    """Mean of ``divergence_per_token``, in nats a token."""
    return float(divergence_per_token(reference, logits).mean())


def nats_per_token(logits: ArrayLike, targets: ArrayLike) -> Floats:
    """Minus log-likelihood of each target in nats; logits ``(tokens, vocabulary)``, targets ``(tokens,)`` integers."""
    array = _logits(logits, "logits")
    wanted = np.asarray(targets)
    if wanted.shape != array.shape[:1] or wanted.dtype.kind not in "iu":
        raise MetricError(
            f"targets must be {array.shape[0]} integers, one for each row of logits; got {wanted.dtype} {wanted.shape}"
        )
    if wanted.min() < 0 or wanted.max() >= array.shape[1]:
        raise MetricError(f"targets must lie in [0, {array.shape[1]}); got {wanted.min()} to {wanted.max()}")
    result = np.empty(len(array))
    for rows in _blocks(array.shape):
        block = _log_softmax(array[rows])
        result[rows] = -block[np.arange(len(block)), wanted[rows]]
    return result


def perplexity(nats: float, tokens: int) -> float:
    """exp(nats / tokens), from the summed negative log-likelihood of so many tokens."""
    if tokens <= 0:
        raise MetricError(f"perplexity needs at least one scored token; got {tokens}")
    if not math.isfinite(nats) or nats / tokens > 700:
        raise NonFiniteError(f"perplexity needs a finite log-likelihood; got {nats} nats over {tokens} tokens")
    if nats < 0:
        raise MetricError(f"a negative log-likelihood is not below 0; got {nats}: its sign is the wrong way round")
    return math.exp(nats / tokens)


def same_top1(reference: ArrayLike, logits: ArrayLike) -> Truths:
    """Whether both put the same token first, for each row; of equal logits the lower token id counts."""
    p_logits, q_logits = _pair(reference, logits)
    return np.asarray(p_logits.argmax(axis=1) == q_logits.argmax(axis=1))


def top1_agreement(reference: ArrayLike, logits: ArrayLike) -> float:
    """Fraction of rows for which both put the same token first."""
    return float(same_top1(reference, logits).mean())


def signal_to_quantization_noise(signal: ArrayLike, approximation: ArrayLike) -> float:
    """10 log10 of the signal's energy over the error's, in decibels; infinite for an exact approximation."""
    exact, rounded = np.asarray(signal), np.asarray(approximation)
    if exact.shape != rounded.shape or exact.size == 0:
        raise MetricError(
            f"signal and approximation must have one shape, not empty; got {exact.shape}, {rounded.shape}"
        )
    exact, rounded = exact.astype(np.float64), rounded.astype(np.float64)
    _finite(exact, "signal")
    _finite(rounded, "approximation")
    energy, noise = float(np.sum(exact**2)), float(np.sum((exact - rounded) ** 2))
    if energy == 0:
        raise MetricError("a signal of zeros has no signal-to-noise ratio")
    return math.inf if noise == 0 else 10 * math.log10(energy / noise)


def bits_per_weight(stored_bytes: int, weights: int) -> float:
    """8 x bytes of weight data / number of weights of the original model."""
    if stored_bytes <= 0 or weights <= 0:
        raise MetricError(f"bits per weight needs bytes and weights above 0; got {stored_bytes} and {weights}")
    return 8 * stored_bytes / weights


def compression(stored_bytes: int, bf16_bytes: int) -> float:
    """1 - bytes / bytes in bf16: 0.8 is five times smaller, below 0 is larger."""
    if stored_bytes <= 0 or bf16_bytes <= 0:
        raise MetricError(f"compression needs bytes above 0; got {stored_bytes} and {bf16_bytes}")
    return 1 - stored_bytes / bf16_bytes


def weighted_mean(sums: ArrayLike, weights: ArrayLike, *, seed: int) -> Estimate:
    """Sum of ``sums`` over sum of ``weights``, and its 95 % percentile interval from resampled documents.

    ``sums[d]`` is the total of document d over its ``weights[d]`` tokens. Tokens of one document resemble each other,
    so documents are drawn with replacement, not tokens (Efron and Tibshirani 1993, chapters 8 and 13). One seed draws
    the same documents for every contender.
    """
    totals, counts = _vector(sums, "sums"), _vector(weights, "weights")
    if totals.shape != counts.shape:
        raise MetricError(f"each document needs a sum and a weight; got {totals.shape} and {counts.shape}")
    if counts.min() <= 0:
        raise MetricError(f"every weight must be above 0; got {counts.min()}")
    mean = float(totals.sum() / counts.sum())
    if len(totals) == 1:
        return Estimate(mean, None)
    random = generator(seed, "bootstrap", len(totals))
    step = max(1, _BLOCK // len(totals))
    means = []
    for start in range(0, RESAMPLES, step):
        drawn = random.integers(len(totals), size=(min(step, RESAMPLES - start), len(totals)))
        means.append(totals[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(mean, (float(low), float(high)))


def accuracy(correct: ArrayLike) -> float:
    """Fraction of true entries of a not empty vector of truths."""
    return float(_truths(correct, "correct").mean())


def paired_accuracy_difference(correct: ArrayLike, reference_correct: ArrayLike, *, seed: int) -> Estimate:
    """Accuracy minus the reference's on the same items, with its 95 % interval from resampled items."""
    ours, theirs = _truths(correct, "correct"), _truths(reference_correct, "reference_correct")
    if ours.shape != theirs.shape:
        raise MetricError(f"a paired difference needs the same items; got {len(ours)} and {len(theirs)}")
    return weighted_mean(ours.astype(np.float64) - theirs, np.ones(len(ours)), seed=seed)


def summarize(values: Sequence[float]) -> Summary:
    """Median, least and greatest of a not empty list of finite numbers."""
    array = _vector(values, "values")
    return Summary(float(np.median(array)), float(array.min()), float(array.max()), len(array))


def _pair(reference: ArrayLike, logits: ArrayLike) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    first, second = _logits(reference, "reference logits"), _logits(logits, "logits")
    if first.shape != second.shape:
        raise MetricError(f"both models need logits of one shape; got {first.shape} and {second.shape}")
    return first, second


def _logits(values: ArrayLike, name: str) -> NDArray[np.floating]:
    array = np.asarray(values)
    if array.ndim != 2 or array.size == 0 or array.dtype.kind != "f":
        raise MetricError(
            f"{name} must be floats of shape (tokens, vocabulary), not empty; got {array.dtype} {array.shape}"
        )
    for rows in _blocks(array.shape):
        _finite(array[rows], name)
    return array


def _vector(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise MetricError(f"{name} must be a list of numbers, not empty; got shape {array.shape}")
    _finite(array, name)
    return array


def _truths(values: ArrayLike, name: str) -> Truths:
    array = np.asarray(values)
    if array.dtype != np.bool_ or array.ndim != 1 or array.size == 0:
        raise MetricError(f"{name} must be a list of truth values, not empty; got {array.dtype} {array.shape}")
    return array


def _finite(array: NDArray[np.floating], name: str) -> None:
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise NonFiniteError(f"{name} holds {bad} NaN or infinite values among {array.size}")


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(1, _BLOCK // shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _log_softmax(logits: NDArray[np.floating]) -> Floats:
    """Rows of log-probabilities in float64; the row's maximum is subtracted first, so that exp cannot overflow."""
    result = logits.astype(np.float64)
    result -= result.max(axis=1, keepdims=True)
    result -= np.log(np.exp(result).sum(axis=1, keepdims=True))
    return result

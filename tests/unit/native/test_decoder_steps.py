"""Layers of other kinds than any family has, as lists of native steps, against the same in float64."""

import numpy as np
import pytest

from quern import _native
from quern._native import Step

VOCABULARY, HIDDEN, INNER, TOKENS = 50, 24, 40, 37
EPSILON = 1e-6
LAYERS = [(2, 16), (1, 8)]
"""Key/value heads and head_dim: no layer is like the other."""
QUERIES = [64, 32]
WINDOWS = [0, 5]
HID, NORMED, BRANCH, GATE, UP, Q0, K0, V0, A0, Q1, K1, V1, A1 = range(13)
WIDTHS = [HIDDEN] * 3 + [INNER] * 2 + [64, 32, 32, 64, 32, 8, 8, 32]
GENERATOR = np.random.default_rng(3)
FREQUENCIES = [[float(1 / 100 ** (i / 8)) for i in range(8)], [float(1 / 30 ** (i / 4)) for i in range(4)]]


def numbers(*shape, size=1.0):
    return (size * GENERATOR.standard_normal(shape)).astype(np.float32)


def matrix(weight):
    return _native.Matrix("float32", *weight.shape, weight.reshape(-1).view(np.uint8))


def linear(weight, bias=None):
    return _native.Linear(matrix(weight), bias)


class Weights:
    def __init__(self):
        self.table, self.head = numbers(VOCABULARY, HIDDEN), numbers(VOCABULARY, HIDDEN, size=HIDDEN**-0.5)
        self.norms = [1 + numbers(HIDDEN, size=0.1) for _ in range(6)]
        self.head_norms = [1 + numbers(16, size=0.1), 1 + numbers(16, size=0.1)]
        self.key_bias = numbers(8)
        self.attention = []
        for (heads, size), width in zip(LAYERS, QUERIES, strict=True):
            shapes = [(width, HIDDEN), (heads * size, HIDDEN), (heads * size, HIDDEN), (HIDDEN, width)]
            self.attention.append([numbers(*shape, size=shape[1] ** -0.5) for shape in shapes])
        self.up0, self.down0 = numbers(INNER, HIDDEN, size=0.2), numbers(HIDDEN, INNER, size=0.2)
        self.gate1, self.up1, self.down1 = (
            numbers(INNER, HIDDEN, size=0.2), numbers(INNER, HIDDEN, size=0.2), numbers(HIDDEN, INNER, size=0.2),
        )  # fmt: skip


def decoder(w: Weights) -> _native.Decoder:
    """Layer 0: norms of heads and after each branch, an MLP without gate. Layer 1: a window, a key bias, a gate."""
    q0, k0, v0, o0 = map(linear, w.attention[0])
    q1, k1, v1, o1 = map(linear, w.attention[1])
    steps = [
        Step.embed(matrix(w.table), HID),
        Step.norm(HID, NORMED, w.norms[0], EPSILON),
        Step.project(NORMED, [q0, k0, v0], [Q0, K0, V0]),
        Step.norm(Q0, Q0, w.head_norms[0], EPSILON),
        Step.norm(K0, K0, w.head_norms[1], EPSILON),
        Step.rotate(Q0, 0, 0.25),
        Step.store(0, K0, V0),
        Step.attend(0, Q0, A0),
        Step.project(A0, [o0], [BRANCH]),
        Step.norm(BRANCH, BRANCH, w.norms[1], EPSILON),
        Step.add(BRANCH, HID),
        Step.norm(HID, NORMED, w.norms[2], EPSILON),
        Step.project(NORMED, [linear(w.up0)], [UP]),
        Step.activate("gelu", UP),
        Step.project(UP, [linear(w.down0)], [BRANCH]),
        Step.add(BRANCH, HID),
        Step.norm(HID, NORMED, w.norms[3], EPSILON),
        Step.project(NORMED, [q1, k1, v1], [Q1, K1, V1]),
        Step.rotate(Q1, 1, 8**-0.5),
        Step.store(1, K1, V1, w.key_bias, 1),
        Step.attend(1, Q1, A1, WINDOWS[1], w.key_bias, 1),
        Step.project(A1, [o1], [BRANCH]),
        Step.add(BRANCH, HID),
        Step.norm(HID, NORMED, w.norms[4], EPSILON),
        Step.project(NORMED, [linear(w.gate1), linear(w.up1)], [GATE, UP]),
        Step.activate("silu", GATE, UP),
        Step.project(GATE, [linear(w.down1)], [BRANCH]),
        Step.add(BRANCH, HID),
        Step.norm(HID, NORMED, w.norms[5], EPSILON),
    ]
    rotaries = [([frequencies], 1.0) for frequencies in FREQUENCIES]
    return _native.Decoder(WIDTHS, LAYERS, rotaries, steps, NORMED, linear(w.head), threads=2)


def rms(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * weight


def rotated(x, frequencies):
    """``x`` (tokens, heads, head_dim)."""
    angle = np.arange(len(x))[:, None, None] * np.array(frequencies)
    first, second = np.split(x, 2, -1)
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], -1
    )


def attention(q, k, v, scale, window):
    """``q`` (tokens, heads, size), ``k`` and ``v`` with fewer heads; (tokens, heads * size)."""
    share = q.shape[1] // k.shape[1]
    scores = np.einsum("thd,shd->hts", q, np.repeat(k, share, 1)) * scale
    back = np.arange(len(q))[:, None] - np.arange(len(q))[None, :]
    scores[:, (back < 0) | ((back >= window) & (window > 0))] = -np.inf
    share_of = np.exp(scores - scores.max(-1, keepdims=True))
    share_of /= share_of.sum(-1, keepdims=True)
    return np.einsum("hts,shd->thd", share_of, np.repeat(v, share, 1)).reshape(len(q), -1)


def gelu(x):
    from math import erf

    return x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))


def expected(w: Weights, tokens) -> np.ndarray:
    hidden = w.table[tokens].astype(np.float64)

    def heads(x, layer, weight):
        return (x @ weight.T).reshape(len(x), -1, LAYERS[layer][1])

    normed = rms(hidden, w.norms[0])
    q, k, v = (heads(normed, 0, weight) for weight in w.attention[0][:3])
    q, k = (rotated(rms(x, norm), FREQUENCIES[0]) for x, norm in zip((q, k), w.head_norms, strict=True))
    hidden += rms(attention(q, k, v, 0.25, WINDOWS[0]) @ w.attention[0][3].T, w.norms[1])
    hidden += gelu(rms(hidden, w.norms[2]) @ w.up0.T) @ w.down0.T
    normed = rms(hidden, w.norms[3])
    q, k, v = (heads(normed, 1, weight) for weight in w.attention[1][:3])
    q, k = rotated(q, FREQUENCIES[1]), rotated(k + w.key_bias, FREQUENCIES[1])
    hidden += attention(q, k, v, 8**-0.5, WINDOWS[1]) @ w.attention[1][3].T
    normed = rms(hidden, w.norms[4])
    gate = normed @ w.gate1.T
    hidden += (gate / (1 + np.exp(-gate)) * (normed @ w.up1.T)) @ w.down1.T
    return rms(hidden, w.norms[5]) @ w.head.T


# Of the greatest logit. float32: sums of at most 64 terms through two layers, a few hundred times 2^-24. The others: what
# rounding keys and values costs, 2^-12 of each or 1 / 254 or 1 / 16 of the greatest.
CACHES = {"float32": 5e-5, "float16": 5e-3, "int8": 0.1, "int4": 0.5}


@pytest.mark.parametrize(("precision", "tolerance"), CACHES.items())
def test_layers_are_what_their_steps_say(precision, tolerance):
    weights = Weights()
    made, tokens = decoder(weights), GENERATOR.integers(0, VOCABULARY, TOKENS)
    exact = expected(weights, tokens)
    pool = made.pool(8, precision)
    whole = made.feed([pool.sequence()], [TOKENS], tokens.astype(np.int32), True)
    assert np.abs(whole - exact).max() < tolerance * np.abs(exact).max()
    sequence = pool.sequence()
    pieces = np.split(tokens.astype(np.int32), [17, 18, 30])
    found = np.concatenate([made.feed([sequence], [len(piece)], piece, True) for piece in pieces])
    assert np.array_equal(found, whole)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda w: Step.add(HID, 13), "a step names buffer 13; there are 13"),
        (lambda w: Step.add(HID, GATE), "what is added is as wide"),
        (lambda w: Step.norm(HID, NORMED, numbers(7), EPSILON), "a norm has one weight a channel"),
        (lambda w: Step.project(HID, [linear(w.down0)], [BRANCH]), "a shape that the config denies"),
        (lambda w: Step.project(HID, [linear(w.up0)], [GATE, UP]), "one buffer a linear"),
        (lambda w: Step.rotate(Q0, 2), "rotary positions that there are not"),
        (lambda w: Step.rotate(HID, 0), "one rotary frequency for two channels"),
        (lambda w: Step.store(2, K0, V0), "a layer that keeps no keys"),
        (lambda w: Step.store(0, K1, V1), "keys and values have the width of their cache"),
        (lambda w: Step.store(0, K0, V0, numbers(8)), "a bias has one number a row"),
        (lambda w: Step.store(0, K0, V0, None, 1), "one rotary frequency"),
        (lambda w: Step.attend(0, Q0, A1), "a multiple of key/value heads"),
        (lambda w: Step.attend(0, Q0, A0, -1), "a window has at least one position"),
        (lambda w: Step.activate("silu", GATE, Q0), "a gate is as wide as what it gates"),
        (lambda w: Step.embed(matrix(w.up0), HID), "vocabulary x hidden"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(step, message):
    weights = Weights()
    rotaries = [([frequencies], 1.0) for frequencies in FREQUENCIES]
    with pytest.raises(ValueError, match=message):
        _native.Decoder(WIDTHS, LAYERS, rotaries, [step(weights)], NORMED, linear(weights.head), threads=1)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="unknown activation 'zap'; known: silu, gelu, gelu_tanh"):
        Step.activate("zap", 0)

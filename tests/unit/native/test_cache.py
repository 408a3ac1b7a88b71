"""The native key/value cache: what a position takes, and attention over integer codes against the same in float64."""

import numpy as np
import pytest

from quern import _native
from quern._native import Step

EPSILON = 1e-6
GROUP = 32
"""Channels that share a scale of the int4 cache."""
GENERATOR = np.random.default_rng(11)
HIDDEN, QUERY, KEY, VALUE, ATTENDED = range(5)


def numbers(*shape):
    return GENERATOR.standard_normal(shape).astype(np.float32)


def plain(weight):
    return _native.Linear(_native.Matrix("float32", *weight.shape, weight.reshape(-1).view(np.uint8)))


class Attention:
    """A decoder that is nothing but attention: queries, keys and values of a token are rows of tables."""

    def __init__(self, heads, head_dim, share=3, *, biased=False, window=0, vocabulary=40):
        self.heads, self.size, self.window = heads, head_dim, window
        width, key_width = heads * share * head_dim, heads * head_dim
        hidden = width + 2 * key_width
        self.table = numbers(vocabulary, hidden)
        self.table[:, width : width + key_width] *= np.where(
            np.arange(key_width) % 7 == 3, 8, 1
        )  # channels that stand out
        self.bias = 30 * numbers(key_width) if biased else None
        self.frequencies = [float(1 / 50 ** (2 * i / head_dim)) for i in range(head_dim // 2)]
        self.parts = np.split(np.eye(hidden, dtype=np.float32), [width, width + key_width])
        self.scale = head_dim**-0.5 / (30 if biased else 1)
        self.widths = [hidden, width, key_width, key_width, width]

    def decoder(self, threads=2):
        steps = [
            Step.embed(_native.Matrix("float32", *self.table.shape, self.table.reshape(-1).view(np.uint8)), HIDDEN),
            Step.project(HIDDEN, [plain(part) for part in self.parts], [QUERY, KEY, VALUE]),
            Step.rotate(QUERY, 0, self.scale),
            Step.store(0, KEY, VALUE, self.bias),
            Step.attend(0, QUERY, ATTENDED, self.window, self.bias),
        ]
        width = self.widths[ATTENDED]
        head = np.zeros(
            (len(self.table), width), np.float32
        )  # logits are the attended numbers, as many as there is room for
        np.fill_diagonal(head, 1)
        rotaries = [([self.frequencies], 1.0)]
        return _native.Decoder(self.widths, [(self.heads, self.size)], rotaries, steps, ATTENDED, plain(head), threads)

    def expected(self, tokens, rounded):
        """Attention in float64 over keys and values that went through ``rounded``; ``(tokens, vocabulary)``."""
        table = self.table[tokens].astype(np.float64)
        width = self.widths[QUERY]
        q, k, v = (
            part.reshape(len(tokens), -1, self.size) for part in np.split(table, [width, width + self.widths[KEY]], 1)
        )
        q, k, bias = self.turned(q), rounded(self.turned(k)), 0
        if self.bias is not None:
            bias = self.turned(np.broadcast_to(self.bias.astype(np.float64).reshape(1, -1, self.size), k.shape))
        share = q.shape[1] // k.shape[1]
        scores = np.einsum("thd,shd->hts", q, np.repeat(k + bias, share, 1)) * self.scale
        back = np.arange(len(q))[:, None] - np.arange(len(q))[None, :]
        scores[:, (back < 0) | ((back >= self.window) & (self.window > 0))] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("hts,shd->thd", weights, np.repeat(rounded(v), share, 1)).reshape(len(q), -1)
        shown = np.zeros((len(q), len(self.table)))
        shown[:, : out.shape[1]] = out[:, : shown.shape[1]]
        return shown

    def turned(self, x):
        angle = (np.arange(len(x), dtype=np.float32)[:, None] * np.float32(self.frequencies)).astype(np.float64)[
            :, None
        ]
        first, second = np.split(x, 2, -1)
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], -1
        )


def hadamard(x):
    """Orthonormal, in blocks of the largest power of two that divides the last axis."""
    block = x.shape[-1] & -x.shape[-1]
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (x.reshape(*x.shape[:-1], -1, block) @ (matrix / block**0.5)).reshape(x.shape)


def nearest16(x):
    """Four bits a number; of five scales, at most an eighth of a group's farthest from zero, the one of least error."""
    out = np.empty_like(x)
    for start in range(0, x.shape[-1], GROUP):
        part = x[..., start : start + GROUP]
        farthest = np.take_along_axis(part, np.abs(part).argmax(-1, keepdims=True), -1)
        tried = []
        for share in (1, 0.95, 0.9, 0.85, 0.8):
            scale = (share * farthest / -8).astype(np.float16).astype(np.float64)
            tried.append(np.clip(np.rint(part / scale), -8, 7) * scale)
        errors = [((each - part) ** 2).sum(-1, keepdims=True) for each in tried]
        best = np.argmin(errors, 0)
        out[..., start : start + GROUP] = np.choose(best, tried)
    return out


def nearest255(x):
    """Eight bits a number: the head's farthest from zero becomes 127 or -127."""
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.rint(x / scale) * scale


ROUNDED = {"int4": nearest16, "int8": nearest255}


def logits(decoder, tokens, precision, *, transformed=True, pieces=()):
    sequence = decoder.pool(64, precision, transformed).sequence()
    parts = np.split(np.asarray(tokens, np.int32), pieces)
    return np.concatenate([decoder.feed([sequence], [len(part)], part, True) for part in parts])


SHAPES = [(1, 2), (2, 14), (1, 24), (2, 32), (2, 48), (1, 64), (1, 80), (1, 128)]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("transformed", [True, False])
@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize(("heads", "head_dim"), SHAPES)
def test_attention_is_that_of_the_rounded_numbers(heads, head_dim, precision, transformed, biased):
    made, tokens = Attention(heads, head_dim, biased=biased, window=21), GENERATOR.integers(0, 40, 70)
    rounded = ROUNDED[precision]
    expected = made.expected(tokens, (lambda x: hadamard(rounded(hadamard(x)))) if transformed else rounded)
    found = logits(made.decoder(), tokens, precision, transformed=transformed)
    # A float32 rounding may put a number on the other side of a tie, one step of sixteen in a few of thousands; otherwise
    # sums of at most 256 float32 terms. Another layout, or a transform left out, is wrong by a tenth and more.
    assert np.median(np.abs(found - expected)) < 1e-5
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("precision", ROUNDED)
def test_the_transform_is_what_keeps_keys_with_outstanding_channels(precision):
    made, tokens = Attention(1, 64), GENERATOR.integers(0, 40, 100)
    decoder, exact = made.decoder(), made.expected(tokens, lambda x: x)
    found = [logits(decoder, tokens, precision, transformed=each) for each in (True, False)]
    error = [np.linalg.norm(each - exact) for each in found]
    assert error[0] < 0.8 * error[1]


def same_everywhere(made, precision):
    """Whether every instruction set, and any cut of the text, gives the same numbers."""
    tokens = GENERATOR.integers(0, 40, 90)
    expected = logits(made.decoder(1), tokens, precision)
    before = _native.isa()
    try:
        for isa in _native.isas():
            _native.use_isa(isa)
            decoder = made.decoder(3)
            assert np.array_equal(logits(decoder, tokens, precision), expected), isa
            assert np.array_equal(logits(decoder, tokens, precision, pieces=[1, 2, 15, 33, 34, 70]), expected), isa
    finally:
        _native.use_isa(before)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("head_dim", [14, 48, 64])
def test_int4_is_the_same_on_every_instruction_set_and_in_any_pieces(head_dim, biased):
    same_everywhere(Attention(2, head_dim, biased=biased), "int4")


@pytest.mark.parametrize("share", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize(("precision", "window"), [("float32", 0), ("float16", 20), ("int8", 0), ("int8", 40)])
def test_so_are_the_others_with_any_number_of_query_heads(precision, window, share):
    same_everywhere(Attention(1, 80, share, window=window), precision)


BYTES = {
    "float32": lambda size: 4 * size,
    "float16": lambda size: 2 * size,
    "int8": lambda size: size + 4,
    "int4": lambda size: size / 2 + 2 * -(-size // GROUP),
}


@pytest.mark.parametrize("precision", BYTES)
@pytest.mark.parametrize(("heads", "head_dim"), SHAPES)
def test_a_page_is_as_large_as_its_layout_says(precision, heads, head_dim):
    each = 2 * heads * BYTES[precision](head_dim)
    assert _native.cache_page_bytes([(heads, head_dim)] * 3, precision) == 3 * each * _native.CACHE_BLOCK
    assert Attention(heads, head_dim).decoder().page_bytes(precision) == each * _native.CACHE_BLOCK


def test_int4_pages_are_cut_back_and_shared():
    made = Attention(2, 32, biased=True)
    decoder, tokens = made.decoder(), GENERATOR.integers(0, 40, 60).astype(np.int32)
    pool = decoder.pool(5, "int4")
    kept, other = pool.sequence(), pool.sequence()
    decoder.feed([kept, other], [33, 17], np.concatenate([tokens[:33], tokens[:17]]), False)
    assert pool.free_pages == 0
    kept.length = 16
    assert pool.free_pages == 2
    decoder.feed([other], [20], tokens[17:37], False)  # takes a page that held other keys
    found = decoder.feed([kept, other], [9, 5], np.concatenate([tokens[16:25], tokens[37:42]]), False)
    for row, length in zip(found, (25, 42), strict=True):
        assert np.array_equal(row, logits(decoder, tokens[:length], "int4")[-1])


def test_sequences_of_different_precisions_go_together():
    made, tokens = Attention(1, 32, biased=True), GENERATOR.integers(0, 40, 30).astype(np.int32)
    decoder = made.decoder()
    opened = {precision: decoder.pool(4, precision).sequence() for precision in BYTES}
    found = decoder.feed(list(opened.values()), [30] * len(opened), np.tile(tokens, len(opened)), False)
    for precision, row in zip(opened, found, strict=True):
        assert np.array_equal(row, logits(decoder, tokens, precision)[-1]), precision


def test_numbers_beyond_a_scale_of_int4_are_told_and_those_that_are_not_finite_stay_so():
    made = Attention(1, 32)
    key = made.widths[QUERY]
    made.table[3, key] = 8e6  # the transform leaves 8e6 / sqrt(32), an eighth of which float16 cannot hold
    made.table[4, key] = np.nan
    made.table[5, key : key + 64] = 0
    decoder = made.decoder()
    for precision in ROUNDED:
        for token, large, finite in (
            (0, False, True),
            (3, True, precision == "int8"),
            (4, False, False),
            (5, False, True),
        ):
            sequence = decoder.pool(1, precision).sequence()
            found = decoder.feed([sequence], [1], np.array([token], np.int32), True)
            assert sequence.overflowed == (large and precision == "int4"), (precision, token)
            assert bool(np.isfinite(found).all()) == finite, (precision, token)


def test_unknown_precisions_are_refused():
    with pytest.raises(ValueError, match="unknown cache precision 'int5'; known: int4, int8, float16, float32"):
        _native.cache_page_bytes([(1, 2)], "int5")
    with pytest.raises(ValueError, match="unknown cache precision 'int5'"):
        Attention(1, 2).decoder().pool(1, "int5")
    with pytest.raises(ValueError, match="only float16 can be widened"):
        Attention(1, 2).decoder().pool(2, "int4").sequence(wide=True)
    for layers in ([(0, 2)], [(1, 0)], [(1, 3)]):
        with pytest.raises(ValueError, match="at least one head, of an even number of channels"):
            _native.cache_page_bytes(layers, "int4")

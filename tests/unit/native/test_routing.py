"""The routed step against experts computed one by one, on plain and packed weights, with and without a shared expert."""

import numpy as np
import pytest

from quern import _native
from quern._native import Step

VOCABULARY, WIDTH, INNER, SHARED, EXPERTS = 60, 32, 48, 64, 12
TOKENS = 70
HID, SCORES, GATE, UP, MADE, OUT, SCORE, SHARED_GATE, SHARED_UP, SHARED_MADE = range(10)
FLOAT32 = 2e-5
"""Sums of up to 64 float32 terms, three after each other, in another order."""


def numbers(*shape, seed=0, size=1.0):
    return (size * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def plain(weight):
    return _native.Matrix("float32", *weight.shape, weight.reshape(-1).view(np.uint8))


def integers(weight, bits, group):
    """The packed matrix, and its values."""
    grouped = weight.reshape(len(weight), -1, group)
    most = 2 ** (bits - 1) - 1
    scale = (np.abs(grouped).max(-1, keepdims=True) / most).astype(np.float16)
    codes = np.clip(np.round(grouped / scale.astype(np.float32)), -most, most)
    values = (codes * scale.astype(np.float32)).reshape(weight.shape)
    codes = codes.reshape(weight.shape).astype(np.int8)
    if bits == 4:
        low = (codes + 8).astype(np.uint8)
        codes = low[:, ::2] | low[:, 1::2] << 4
    arrays = {"codes": codes.reshape(-1).view(np.uint8), "scale": scale.reshape(-1).view(np.uint8)}
    return _native.Matrix(f"integer{bits}", *weight.shape, **arrays, group=group), values


KINDS = ("plain", "4 bits", "8 bits", "8 bits, fine", "4 bits, rotated", "mixed")


class Model:
    """A router, experts and a shared one behind an embedding; the head reads what they make."""

    def __init__(self, kind="plain", per_token=3, renormalize=True, shared=True, threads=1):
        self.kind, self.per_token, self.renormalize, self.shared = kind, per_token, renormalize, shared
        self.table, self.head = numbers(VOCABULARY, WIDTH, seed=1), numbers(VOCABULARY, WIDTH, seed=2, size=0.2)
        self.router, self.score = numbers(EXPERTS, WIDTH, seed=3, size=0.4), numbers(1, WIDTH, seed=4, size=0.3)
        self.experts, linears = [], []
        for expert in range(EXPERTS):
            mlp = [self.linear(shape, 10 * expert + 20 + at) for at, shape in enumerate(self.shapes(INNER))]
            linears.append(tuple(linear for linear, *_ in mlp))
            self.experts.append([rest for _, *rest in mlp])
        mlp = [self.linear(shape, 7 + at) for at, shape in enumerate(self.shapes(SHARED))]
        self.shared_expert = [rest for _, *rest in mlp]
        beside = ((SCORE, SHARED_GATE, SHARED_UP, SHARED_MADE), tuple(linear for linear, *_ in mlp)) if shared else ()
        routers = [_native.Linear(plain(self.router)), _native.Linear(plain(self.score))]
        steps = [
            Step.embed(plain(self.table), HID),
            Step.project(HID, routers, [SCORES, SCORE]),
            Step.routed((HID, SCORES, GATE, UP, MADE, OUT), per_token, renormalize, "silu", linears, *beside),
        ]
        widths = [
            WIDTH,
            EXPERTS,
            per_token * INNER,
            per_token * INNER,
            per_token * WIDTH,
            WIDTH,
            1,
            SHARED,
            SHARED,
            WIDTH,
        ]
        self.decoder = _native.Decoder(
            widths, [(1, 2)], [([[1.0]], 1.0)], steps, OUT, _native.Linear(plain(self.head)), threads
        )

    @staticmethod
    def shapes(inner):
        return [(inner, WIDTH), (inner, WIDTH), (WIDTH, inner)]

    def linear(self, shape, seed):
        """The native linear, its values, and what is done to its inputs."""
        weight = numbers(*shape, seed=seed, size=shape[1] ** -0.5)
        kind = ("plain", "4 bits", "8 bits")[seed % 3] if self.kind == "mixed" else self.kind
        if kind == "plain":
            return _native.Linear(plain(weight)), weight, None, "exact"
        matrix, values = integers(weight, 4 if "4" in kind else 8, 16)
        signs = np.random.default_rng(seed // 10).integers(0, 256, -(-shape[1] // 8)).astype(np.uint8)
        signs = signs if "rotated" in kind else None
        return _native.Linear(matrix, None, signs, "fine" in kind), values, signs, "fine" if "fine" in kind else "int8"

    def run(self, tokens, counts=None):
        """Logits of all tokens; ``counts``: of sequences that they are of."""
        pool = self.decoder.pool(100, "float32")
        counts = counts or [len(tokens)]
        return self.decoder.feed([pool.sequence() for _ in counts], counts, np.asarray(tokens, np.int32), True)

    def expected(self, tokens):
        hidden = self.table[tokens].astype(np.float64)
        scores = hidden @ self.router.T.astype(np.float64)
        odds = np.exp(scores - scores.max(-1, keepdims=True))
        odds /= odds.sum(-1, keepdims=True)
        out = np.zeros_like(hidden)
        for row, (x, chances) in enumerate(zip(hidden, odds, strict=True)):
            chosen = np.argsort(-chances, kind="stable")[: self.per_token]
            total = chances[chosen].sum() if self.renormalize else 1.0
            for expert in chosen:
                out[row] += chances[expert] / total * mlp(self.experts[expert], x)
            if self.shared:
                out[row] += mlp(self.shared_expert, x) / (1 + np.exp(-(self.score[0].astype(np.float64) @ x)))
        return out @ self.head.T.astype(np.float64)


def mlp(linears, x):
    gate, up, down = (lambda y, linear=linear: product(linear, y) for linear in linears)
    return down(gate(x) / (1 + np.exp(-gate(x))) * up(x))


def product(linear, x):
    values, signs, inputs = linear
    if signs is not None:
        x = _native.rotate(x[None].astype(np.float32), signs, 1)[0].astype(np.float64)
    if inputs == "int8":
        grouped = x.reshape(-1, 16)
        scale = np.abs(grouped).max(-1, keepdims=True) / 127
        x = (np.round(grouped / scale) * scale).reshape(-1)
    return values.astype(np.float64) @ x


TEXT = np.random.default_rng(5).integers(0, VOCABULARY, TOKENS).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 2, TOKENS])
def test_it_is_the_weighted_sum_of_the_chosen_experts(kind, tokens):
    model = Model(kind)
    found, expected = model.run(TEXT[:tokens]), model.expected(TEXT[:tokens])
    # A float32 rounding may move an input across a tie: a step of 127 of one of 32 inputs.
    bound = {"plain": FLOAT32, "8 bits, fine": 2e-4}.get(kind, 0.01)
    assert np.abs(found - expected).max() < bound * np.abs(expected).max()


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("per_token", [1, EXPERTS])
def test_ways_to_weigh(renormalize, shared, per_token):
    model = Model("plain", per_token, renormalize, shared)
    expected = model.expected(TEXT)
    assert np.abs(model.run(TEXT) - expected).max() < FLOAT32 * np.abs(expected).max()


@pytest.mark.parametrize("kind", KINDS)
def test_bits_depend_on_neither_threads_nor_what_else_is_computed(kind):
    model = Model(kind)
    together = model.run(TEXT)
    assert np.array_equal(Model(kind, threads=2).run(TEXT), together)
    assert np.array_equal(Model(kind, threads=5).run(TEXT, [30, 1, 2, 7, 30]), together)
    assert np.array_equal(np.concatenate([model.run([token]) for token in TEXT]), together)
    before = _native.isa()
    try:
        for isa in _native.isas():
            _native.use_isa(isa)
            assert np.array_equal(Model(kind, threads=2).run(TEXT), together), isa
    finally:
        _native.use_isa(before)


def test_the_lowest_of_equal_experts_is_chosen():
    model = Model("plain", 2, renormalize=True, shared=False)
    model.router[:] = model.router[0]
    routers = [_native.Linear(plain(model.router)), _native.Linear(plain(model.score))]
    first = mlp_of(model, [0, 1])
    linears = [tuple(_native.Linear(plain(weight)) for weight, *_ in expert) for expert in model.experts]
    steps = [
        Step.embed(plain(model.table), HID),
        Step.project(HID, routers, [SCORES, SCORE]),
        Step.routed((HID, SCORES, GATE, UP, MADE, OUT), 2, True, "silu", linears),
    ]
    widths = [WIDTH, EXPERTS, 2 * INNER, 2 * INNER, 2 * WIDTH, WIDTH, 1]
    model.decoder = _native.Decoder(
        widths, [(1, 2)], [([[1.0]], 1.0)], steps, OUT, _native.Linear(plain(model.head)), 1
    )
    assert np.abs(model.run(TEXT[:4]) - first).max() < FLOAT32 * np.abs(first).max()


def mlp_of(model, experts):
    """Logits where these experts have the same weight."""
    hidden = model.table[TEXT[:4]].astype(np.float64)
    out = [np.mean([mlp(model.experts[expert], x) for expert in experts], axis=0) for x in hidden]
    return np.array(out) @ model.head.T.astype(np.float64)


def test_scores_that_are_no_numbers_stay_with_their_token():
    model = Model("plain")
    expected = model.run(TEXT)
    model.table[TEXT[0]] = np.nan
    found = model.run(TEXT)
    broken = np.array(TEXT) == TEXT[0]
    assert np.isnan(found[broken]).all()
    assert np.array_equal(found[~broken], expected[~broken])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"per_token": 0}, "at least one expert"),
        ({"per_token": 13}, "not more than there are"),
        ({"gate": 1}, "room for the gates"),
        ({"made": 1}, "room for what each"),
        ({"scores": HID}, "one score for each expert"),
        ({"to": UP}, "as wide as what they read"),
        ({"from": 90}, "a buffer that there is not"),
    ],
)
def test_what_does_not_fit_is_refused(change, reason):
    model = Model("plain", 3)
    linears = [tuple(_native.Linear(plain(weight)) for weight, *_ in expert) for expert in model.experts]
    per_token = change.get("per_token", 3)
    places = (change.get("from", HID), change.get("scores", SCORES), GATE, UP, MADE, change.get("to", OUT))
    room = 3 * INNER + change.get("gate", 0)
    widths = [WIDTH, EXPERTS, room, room, 3 * WIDTH + change.get("made", 0), WIDTH]
    step = Step.routed(places, per_token, True, "silu", linears)
    with pytest.raises(ValueError, match=reason):
        _native.Decoder(widths, [(1, 2)], [([[1.0]], 1.0)], [step], OUT, _native.Linear(plain(model.head)), 1)

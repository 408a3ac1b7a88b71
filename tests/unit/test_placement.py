"""Each row's place on the scale A, B, C, with the figures that put it there."""

from __future__ import annotations

import itertools
import math

import pytest
from sample_results import make_reference, make_row, sample_rows, sample_tool_rows

from quern.advisor.placement import KINDS, placements, small_loss_limit
from quern.advisor.recommend import pareto_front
from quern.advisor.scoring import SMALL_LOSS
from quern.core.results import Row, Spread

LIMIT = SMALL_LOSS * math.log(20.0)
"""Of rows made by ``make_row``: their perplexity is 20."""


def kinds(rows: list[Row]) -> dict[str, str]:
    return {row.name: place.kind for row, place in zip(rows, placements(rows), strict=True)}


def reason(rows: list[Row], name: str) -> str:
    return next(place.reason for row, place in zip(rows, placements(rows), strict=True) if row.name == name)


def timed(name: str, median: float, low: float, high: float, **changes: float) -> Row:
    spread = Spread(median=median, low=low, high=high, rounds=5)
    return make_row(name, decode_tokens_per_s=median, speed_spread={"decode_tokens_per_s": spread}, **changes)


def test_sample():
    assert kinds(sample_rows()) == {
        "reference": "unquantized",
        "fast": "B",
        "balanced": "C",
        "rtn4": "dominated",
        "compact": "A",
        "w8a16": "C",
        "tiny2": "A",
    }


def test_reasons_name_the_figures():
    rows = sample_tool_rows()
    assert reason(rows, "compact").startswith("2.81 MB, 80.2 % smaller than bf16; decodes 447 tokens/s; KL 0.0942")
    assert "KL 0.811, more than the 0.339 that an unquantized model" in reason(rows, "tiny2")
    assert "decodes 372 tokens/s, fastest of the 5 of small loss: KL 0.0019 of at most 0.0224" in reason(
        rows, "onnxruntime-int8"
    )
    assert "within the rounds of onnxruntime-int8 (372)" in reason(rows, "fast")
    assert reason(rows, "rtn4") == (
        "dominated by balanced: the same 3.99 MB; decodes 418 against 416 tokens/s; KL 0.0284 against 0.0907"
    )
    assert reason(rows, "openvino-int4-g64") == "its decode speed was not measured"
    for row, place in zip(rows, placements(rows), strict=True):
        assert place.kind in KINDS
        assert place.kind == "not placed" or any(character.isdigit() for character in place.reason)
        assert (place.by is None) == (place.kind != "dominated" and "dominated" not in place.reason), row.name


@pytest.mark.parametrize(
    ("size", "kl", "decode", "kind"),
    [
        (199, LIMIT * 0.99, 200.0, "A, B and C"),
        (199, LIMIT * 1.01, 200.0, "A"),
        (200, LIMIT * 0.99, 200.0, "B"),
        (200, LIMIT * 1.01, 200.0, "C"),
        (199, LIMIT * 0.99, 100.0, "A"),
    ],
)
def test_each_place_begins_at_its_limit(size: int, kl: float, decode: float, kind: str):
    """Over 80 % smaller; at most 1 % of the cross entropy; faster than the unquantized model."""
    rows = [make_reference(), make_row("row", bytes=size, kl_mean=kl, decode_tokens_per_s=decode)]
    assert kinds(rows)["row"] == kind


def test_only_the_fastest_of_small_loss_is_b():
    rows = [
        make_reference(),
        make_row("fastest", bytes=700, kl_mean=0.01, decode_tokens_per_s=300.0),
        make_row("second", bytes=600, kl_mean=0.01, decode_tokens_per_s=290.0),
        make_row("lossy", bytes=600, kl_mean=0.1, decode_tokens_per_s=400.0),
    ]
    assert kinds(rows) == {"reference": "unquantized", "fastest": "B", "second": "C", "lossy": "C"}


def test_speeds_that_repeats_cannot_tell_apart_share_the_place():
    rows = [
        make_reference(),
        timed("one", 300.0, 290.0, 310.0, bytes=700, kl_mean=0.005),
        timed("two", 295.0, 285.0, 305.0, bytes=600, kl_mean=0.01),
        timed("three", 280.0, 275.0, 284.0, bytes=500, kl_mean=0.02),
    ]
    assert kinds(rows) == {"reference": "unquantized", "one": "B", "two": "B", "three": "C"}


def test_no_row_is_b_where_quantizing_gained_no_speed():
    rows = [make_reference(), make_row("slow", decode_tokens_per_s=80.0)]
    assert kinds(rows)["slow"] == "C"
    noisy = [
        timed("u", 100.0, 90.0, 110.0, bytes=1000, kl_mean=0.0).model_copy(
            update={"kind": "unquantized", "recipe": None}
        )
    ]
    noisy.append(timed("same", 101.0, 95.0, 108.0))
    assert kinds(noisy)["same"] == "C"


def test_a_dominated_row_has_no_place_however_small_it_is():
    rows = [
        make_reference(),
        make_row("good", bytes=150, kl_mean=0.01, decode_tokens_per_s=200.0),
        make_row("bad", bytes=160, kl_mean=0.02, decode_tokens_per_s=190.0),
    ]
    assert kinds(rows)["bad"] == "dominated"
    assert placements(rows)[2].label == "dominated by good"
    assert reason(rows, "bad") == (
        "dominated by good: 150 bytes against 160 bytes; decodes 200 against 190 tokens/s; KL 0.01 against 0.02"
    )


def test_front_and_places_agree():
    rows = sample_tool_rows()
    on_front = {name for name, kind in kinds(rows).items() if kind in ("A, B and C", "A", "B", "C")}
    assert on_front == pareto_front(rows) - {"reference"}


def test_order_of_rows_does_not_matter():
    rows = sample_rows()[:5]
    expected = kinds(rows)
    for shuffled in itertools.permutations(rows):
        assert kinds(list(shuffled)) == expected


def test_small_loss_is_one_percent_of_the_cross_entropy_or_the_noise_floor():
    assert small_loss_limit([make_reference()]) == pytest.approx(LIMIT, rel=1e-12)
    assert small_loss_limit([make_reference(kl_noise_floor=0.5)]) == 0.5
    assert small_loss_limit([make_reference(perplexity=None)]) is None
    assert small_loss_limit([]) is None


def test_missing_figures():
    assert placements([]) == []
    assert kinds([make_reference(), make_row("x", kl_mean=None)])["x"] == "not placed"
    both = [make_reference(), make_row("x", kl_mean=None, decode_tokens_per_s=None)]
    assert reason(both, "x") == "its decode speed and its KL were not measured"
    # Without a perplexity nothing shows that a loss is small; without any speed nothing is fastest.
    no_perplexity = {"perplexity": None, "decode_tokens_per_s": 300.0}
    assert kinds([make_reference(perplexity=None), make_row("x", **no_perplexity)])["x"] == "C"
    no_speed = {"decode_tokens_per_s": None, "time_to_first_token_s": None}
    assert kinds([make_reference(**no_speed), make_row("x", bytes=100, **no_speed)])["x"] == "A"


def test_without_the_unquantized_model():
    assert kinds([make_row("only", kl_mean=0.001)]) == {"only": "B"}


def test_a_lead_in_speed_within_the_drift_of_the_machine_does_not_dominate():
    """The second row's group ran while the machine was 16 % faster."""
    good = make_row("good", bytes=400, kl_mean=0.03, decode_tokens_per_s=110.0)
    bad = make_row("bad", kl_mean=0.04)
    rows = [make_reference(), good, bad]
    assert kinds(rows)["bad"] == "dominated"
    drifted = [make_reference(group_speed=1.0), good.model_copy(update={"group_speed": 1.16}), bad]
    assert kinds(drifted)["bad"] == "C"
    assert "good may dominate it" in reason(drifted, "bad")
    assert "the machine ran 16.0 % faster while good was timed" in reason(drifted, "bad")
    assert "no row is at once" not in reason(drifted, "bad")
    assert pareto_front(drifted) >= {"good", "bad"}
    small = [rows[0], good.model_copy(update={"group_speed": 1.09}), bad]
    assert kinds(small)["bad"] == "dominated", "up to 10 % is not counted"
    faster_machine = [rows[0], good, bad.model_copy(update={"group_speed": 1.16})]
    assert kinds(faster_machine)["bad"] == "dominated", "it was slower although the machine was faster"
    ahead = [rows[0], good.model_copy(update={"group_speed": 1.16, "decode_tokens_per_s": 117.0}), bad]
    assert kinds(ahead)["bad"] == "dominated", "a lead beyond the drift holds"


def test_fastest_is_not_settled_by_a_lead_within_the_drift():
    rows = [
        make_reference(),
        make_row("one", bytes=700, kl_mean=0.005, decode_tokens_per_s=300.0, group_speed=1.3),
        make_row("two", bytes=600, kl_mean=0.01, decode_tokens_per_s=240.0),
    ]
    assert kinds(rows) == {"reference": "unquantized", "one": "B", "two": "B"}
    assert "cannot be told from one (300), the fastest of small loss" in reason(rows, "two")
    assert "the machine ran 30.0 % faster while one was timed" in reason(rows, "two")
    rows[2] = rows[2].model_copy(update={"decode_tokens_per_s": 220.0})
    assert kinds(rows)["two"] == "C"
    slow = [make_reference(), make_row("gain", kl_mean=0.005, decode_tokens_per_s=120.0, group_speed=1.3)]
    assert kinds(slow)["gain"] == "C", "it may be no faster than the unquantized model"

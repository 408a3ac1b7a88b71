"""Whether a linear's error is far above its neighbours': on made-up errors, and on those of real models."""

import json
import math
import random
import re
from pathlib import Path

import pytest
import torch

from quern.core.machine.parallel import deterministic_workers
from quern.quantization.health import BIT, DAMAGED, FEWEST, NEIGHBOURS, count_wrong, greatest, standing

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
USUAL = [0.010, 0.011, 0.009, 0.0105, 0.0095, 0.01, 0.0102, 0.0099]


OTHERS = {str(number): [one * 2**number for one in USUAL] for number in range(6)}


def among(error, neighbours, others=OTHERS):
    return standing(error, "own", {"own": neighbours, **others}, 210)


@pytest.mark.parametrize(
    ("error", "state"),
    [(0.01, "healthy"), (0.039, "healthy"), (0.05, "out of line"), (0.11, "out of line"), (0.12, "damaged"), (9.0, "damaged")],
)  # fmt: skip
def test_an_error_among_its_neighbours(error, state):
    found = among(error, USUAL)
    assert found.state == state
    assert found.usual == pytest.approx(0.01, rel=0.01)


def test_a_spread_that_explains_it_is_heeded():
    wide = [0.001, 0.004, 0.02, 0.003, 0.05, 0.002, 0.01, 0.008]
    assert among(0.2, wide).state == "healthy"
    assert among(0.2, USUAL).state == "damaged"


def test_few_neighbours_say_nothing_but_for_the_spreads_of_other_roles():
    assert among(0.9, USUAL[: FEWEST - 1]).state == "healthy"
    assert among(0.9, USUAL[:FEWEST], {}).state == "healthy"
    assert among(0.9, USUAL[:FEWEST]).state == "damaged"


def test_exact_neighbours_have_no_spread_and_zeros_do_not_count():
    assert among(BIT * 0.01 * 1.01, [0.01] * 4, {}).state == "out of line"
    assert among(BIT * 0.01 * 0.99, [0.01] * 4, {}).state == "healthy"
    assert among(0.5, [0.0] * 8, {}).state == "healthy"
    assert among(0.0, [0.01] * 4, {}).state == "healthy"


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_what_is_no_number_has_no_standing(error):
    with pytest.raises(ValueError, match="no standing"):
        among(error, USUAL)


def test_chance_alone_is_rarely_out_of_line():
    """Models of 210 linears whose log errors are normal with one spread: one in a hundred may have one by chance."""
    draw, alarms, models = random.Random(1), 0, 20
    for _ in range(models):
        errors = {role: [math.exp(draw.gauss(-5, 1.5)) for _ in range(30)] for role in "qkvogud"}
        for at in range(30):
            before = {role: some[max(0, at - NEIGHBOURS) : at] for role, some in errors.items()}
            alarms += sum(standing(errors[role][at], role, before, 210).state != "healthy" for role in errors)
    assert alarms <= 2


def runs():
    """Of every run in the results: by role, error and bits of the linears of all blocks, in order."""
    for path in sorted(RESULTS.glob("*.json")):
        for row in json.loads(path.read_text("utf-8")).get("rows", []):
            layers = row.get("layers") if isinstance(row, dict) else None
            by_role = {}
            for layer in layers if isinstance(layers, list) else ():
                if found := re.fullmatch(r"model\.layers\.(\d+)\.(.*)", layer["linear"]):
                    entry = int(found[1]), layer["relative_error"], round(layer["bits_per_weight"], 1)
                    by_role.setdefault(found[2], []).append(entry)
            if by_role:
                yield {role: sorted(entries) for role, entries in by_role.items()}


def test_no_linear_of_a_measured_model_is_damaged_and_few_are_out_of_line():
    counts = {"healthy": 0, "out of line": 0, "damaged": 0}
    for by_role in runs():
        for role, entries in by_role.items():
            for at, error, _ in entries:
                before = {
                    name: [e for place, e, bits in some if at - NEIGHBOURS <= place < at and bits == some[at][2]]
                    for name, some in by_role.items()
                }
                if len(before[role]) >= FEWEST:
                    counts[standing(error, role, before, sum(map(len, by_role.values()))).state] += 1
    assert counts["healthy"] > 10_000
    assert counts["damaged"] == 0
    assert 0 < counts["out of line"] < counts["healthy"] / 1000, counts
    assert DAMAGED > 0.1


def test_numbers_that_are_none_are_counted():
    values = torch.zeros(2500, 3)
    with deterministic_workers(2) as workers:
        assert count_wrong(values, workers) == 0
        values[0, 0], values[2400, 1], values[2499, 2] = math.nan, math.inf, -math.inf
        assert count_wrong(values.bfloat16(), workers) == 3
    assert math.isnan(greatest(torch.tensor([1.0, math.nan, -5.0])))
    assert greatest(torch.tensor([1.0, -5.0])) == 5.0

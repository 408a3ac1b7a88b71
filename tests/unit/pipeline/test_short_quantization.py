"""What short runs amount to: times that were made up by known rates give these rates back, and little is left to chance."""

import math
import subprocess
import sys

import pytest
from repository_tools import load_tool
from test_forecast_counts import GPTQ4, NEAREST, case, open_subject_of
from tiny_model import tiny_config

from quern.core.machine.foreign_load import ForeignLoad
from quern.core.recipe import parse_recipe
from quern.pipeline.forecasting import short_quantization
from quern.pipeline.forecasting.counted import case_of
from quern.pipeline.forecasting.short_quantization import HELD_OUT, MOST_TOKENS, SHARE, _counts, _Run, _solved

CONFIG = tiny_config(hidden_size=128, intermediate_size=192, max_position_embeddings=1024)
DRIFT = {**GPTQ4, "rounding": {"method": "gptq", "target": "drift"}}


def told(recipe=GPTQ4, **calibration):
    values = {**recipe, "calibration": {**recipe["calibration"], **calibration}}
    return case_of(open_subject_of(CONFIG), parse_recipe(values, "test"))


def made_up(work, tokens, *, blocks, weighing, fixed, noise=0.0):
    """Seconds of a run with these rates."""
    block = fixed + tokens * (work.token_operations - work.weighing_operations) / blocks + noise
    weighed, head = tokens * work.weighing_operations / weighing, tokens * work.head_operations / 5e9
    return _Run(block, weighed, head, 0.01, block + weighed + head + 0.01 + 0.3)


def solved(noise=0.0, blocks=2e9, weighing=3e9, fixed=4.0):
    short, counts = told(), [1024, 4096]
    runs = [
        made_up(short.work, tokens, blocks=blocks, weighing=weighing, fixed=fixed, noise=more)
        for tokens, more in zip(counts, (noise, 0.0), strict=True)
    ]
    warm = _Run(runs[0].block + 0.7, runs[0].weighing, runs[0].head, 0.01, runs[0].whole + 0.7)
    return short, runs, _solved(short, warm, runs, counts, 1)


def test_times_that_were_made_up_give_their_rates_back():
    short, _, rates = solved()
    assert math.isclose(rates.blocks, 2e9, rel_tol=1e-9)
    assert math.isclose(rates.weighing, 3e9, rel_tol=1e-9)
    assert math.isclose(rates.head, 5e9, rel_tol=1e-9)
    weights, feedback = short.work.weights.total(), short.work.feedback_operations
    assert math.isclose(rates.weight * weights + feedback / rates.blocks, 4.0, rel_tol=1e-9)
    assert math.isclose(rates.once, 0.3, rel_tol=1e-9)
    assert math.isclose(rates.first, 0.7, rel_tol=1e-9)


@pytest.mark.parametrize("noise", [-3.0, 0.0, 3.0])
def test_whatever_chance_does_the_longer_run_is_what_it_took(noise):
    """With its number of tokens a forecast of this model says its time again, however its parts are told apart."""
    short, runs, rates = solved(noise)
    work, tokens = short.work, 4096
    again = tokens * (work.token_operations - work.weighing_operations) / rates.blocks
    again += work.feedback_operations / rates.blocks + rates.weight * work.weights.total()
    assert math.isclose(again, runs[1].block, rel_tol=0.01)  # error feedback stays where nothing else is left
    assert rates.weighing / 3 <= rates.blocks * 1.000001


def test_a_shorter_run_that_took_longer_makes_no_rate_beyond_all_measure():
    """As it did where the difference of two runs alone counted: 1,320 Gop in .000128 ms."""
    _, _, rates = solved(noise=60.0)
    assert rates.blocks <= short_quantization.APART * rates.weighing * 1.000001


def test_a_recipe_of_few_tokens_is_run_with_as_many():
    assert _counts(told(tokens=512, sequence_length=64), 1e6) == ([128, 512], 64)
    assert _counts(told(tokens=100, sequence_length=64), 1e6) == ([64, 128], 64)


def test_one_of_many_is_run_with_those_that_take_seconds():
    counts, length = _counts(told(tokens=1 << 20, sequence_length=512), 1e6)
    assert (counts, length) == ([MOST_TOKENS // SHARE, MOST_TOKENS], 512)
    counts, _ = _counts(told(tokens=1 << 20, sequence_length=512), 1e12)
    assert counts == [512, 1024]


def test_where_sequences_are_held_out_there_are_enough():
    for tokens in (1024, 1 << 20):
        counts, length = _counts(told(DRIFT, tokens=tokens, sequence_length=512), 1e6)
        assert counts[0] // length >= HELD_OUT
        assert counts[0] < counts[1]


def test_without_tokens_there_is_one_kind_of_run():
    counts, _ = _counts(told(NEAREST), 1e6)
    assert counts == [0] * short_quantization.AGAIN


def test_processes_that_were_started_are_no_foreign_load():
    load = ForeignLoad()
    spin = "import time\nwhile time.process_time() < 0.4: pass"
    subprocess.run([sys.executable, "-c", spin], check=True)
    assert load._own_seconds() - load._own >= 0.35


def test_weights_are_drawn_for_long_enough_to_tell(tmp_path):
    assert short_quantization.drawing_rate(told()) is None
    folder = load_tool("make_synthetic_checkpoint").make(tmp_path / "drawn", CONFIG)
    assert short_quantization.drawing_rate(case(folder, GPTQ4)) > 1e6

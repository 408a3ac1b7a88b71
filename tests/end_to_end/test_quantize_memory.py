"""Quantizing stays under ``memory`` and needs no more for a deep model than for a shallow one. Each run is a process."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from artifacts import INT8, small_recipe
from tiny_model import calibration_text, tiny_config, write_model

from quern.cli.options import parse_size
from quern.core.errors import OutOfMemoryCapError
from quern.pipeline.quantize import quantize

PROBE = Path(__file__).resolve().parents[1] / "memory_probe.py"
MIB = 1 << 20
FOUR_BITS = {"bits": 4, "symmetric": False, "group_size": 64}
WIDE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2}


def probe(folder: Path, config: dict, slack: int | None, tokens: int = 4096, threads: int = 2, **choices) -> dict:
    """Peak and cap in bytes of one quantization in a process of its own."""
    write_model(folder / "model", config)
    (folder / "text.txt").write_text(calibration_text(), "utf-8")
    weighted = choices.pop("calibration", {})
    recipe = small_recipe(**choices, calibration={"tokens": tokens, "sequence_length": 128, **weighted}).to_json()
    (folder / "recipe.json").write_text(json.dumps(recipe), "utf-8")
    places = [str(folder / name) for name in ("model", "out", "recipe.json", "text.txt")]
    command = [sys.executable, str(PROBE), *places, str(threads), "none" if slack is None else str(slack)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


RECIPES = {
    "gptq": {"weights": FOUR_BITS, "rounding": {"method": "gptq"}, "embedding": INT8},
    "everything": {
        "weights": FOUR_BITS,
        "rounding": {"method": "gptq", "target": "drift", "sweeps": 1, "two_sided": True},
        "embedding": INT8,
    },
    "tuned": {
        "weights": FOUR_BITS,
        "rounding": {"method": "gptq"},
        "embedding": INT8,
        "tuning": {"passes": 1},
        "calibration": {"token_weight": "fisher"},
    },
    "awq": {"weights": FOUR_BITS, "transforms": [{"method": "awq"}]},
    "nearest": {"weights": FOUR_BITS, "embedding": {"bits": 4, "group_size": 64}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_peak_stays_under_a_cap_that_barely_suffices(name, tmp_path):
    """The cap is the plan plus 4 MiB (what the process grows between asking and starting)."""
    wide = {**WIDE, "vocab_size": 16_000} if name == "nearest" else WIDE
    seen = probe(tmp_path, tiny_config(**wide), 4 * MIB, **RECIPES[name])
    assert seen["before"] < seen["peak"] <= seen["cap"]


def test_the_peak_does_not_grow_with_the_number_of_layers(tmp_path):
    """Three and eight layers of one width, within 5 %; the weights of five layers, if they stayed, would be more than 8 %.

    With one thread: with several, how the allocator's arenas fill depends on who comes first.
    """
    peaks, width, inner = {}, 512, 1536
    choices = {**RECIPES["gptq"], "weights": {**FOUR_BITS, "observer": "min_max"}}
    for layers in (3, 8):
        config = tiny_config(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers)
        peaks[layers] = probe(tmp_path / str(layers), config, None, tokens=512, threads=1, **choices)["peak"]
    assert 5 * 4 * 3 * width * inner > 0.08 * peaks[3]
    assert abs(peaks[8] / peaks[3] - 1) <= 0.05, peaks


def test_a_cap_that_is_too_small_says_the_least_that_would_do(tiny_model, tiny_text, tmp_path):
    job = {
        "recipe": small_recipe(weights=FOUR_BITS, rounding={"method": "gptq"}),
        "calibration": [tiny_text],
        "threads": 1,
    }
    with pytest.raises(
        OutOfMemoryCapError, match=r"a memory cap of 10.5 MB is too small: .* needs \d+ MB. Give at least"
    ) as caught:
        quantize(tiny_model, tmp_path / "out", memory=10 * MIB, **job)
    named = int(re.search(r"at least memory=([\d_]+)", str(caught.value))[1])
    assert caught.value.least_bytes <= named < caught.value.least_bytes + 10**6
    typed = re.search(r"at least --memory (\w+)", caught.value.on_command_line)[1]
    assert parse_size(typed, "--memory") == named
    assert list(tmp_path.iterdir()) == [], "nothing was done yet, so another recipe may be tried in the same place"
    nearest = {**job, "recipe": small_recipe(weights=FOUR_BITS)}
    quantize(tiny_model, tmp_path / "out", memory=named + 64 * MIB, **nearest)


def test_more_is_planned_where_more_is_needed(tiny_model, tiny_text, tmp_path):
    """The least cap, as a difference to that of the smallest request."""

    def least(model: Path, threads: int = 1, **choices) -> int:
        with pytest.raises(OutOfMemoryCapError) as caught:
            quantize(
                model,
                tmp_path / "out",
                recipe=small_recipe(**choices),
                calibration=[tiny_text],
                memory=1,
                threads=threads,
            )
        return caught.value.least_bytes

    wide = write_model(tmp_path / "wide", tiny_config(**WIDE))
    nearest = least(wide, weights=FOUR_BITS)
    assert least(wide, threads=8, weights=FOUR_BITS) > nearest + 5 * MIB
    assert least(wide, weights=FOUR_BITS, rounding={"method": "gptq"}) > nearest + 5 * MIB
    assert least(tiny_model, weights=FOUR_BITS) < nearest

"""Mixes by llama.cpp's names: files whose tensors have the types that llama-quantize gives them, and its ``file_type``.

Skipped where llama.cpp is not installed (``quern peers install llama.cpp``).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llama_cpp_mixes import Programs, types
from mix_types import MODELS
from tiny_model import write_model

from quern.core.errors import UserError
from quern.core.recipe import Recipe, parse_recipe
from quern.peers.environment import Environment
from quern.pipeline.export import export
from quern.pipeline.quantize import quantize

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "models" / "python-7m"
TABLE = json.loads((ROOT / "tests" / "golden" / "llama_cpp_mixes.json").read_text("utf-8"))
MIXES = ("q2_k_s", "q4_k_m", "q5_k_s")
"""Of the shipped ones; all are in the table."""


def nearest(mix: str) -> Recipe:
    """The mix without calibration, which its types do not depend on."""
    return parse_recipe(
        {"name": "x", "mix": mix, "rounding": {"method": "nearest"}, "calibration": {"token_weight": "none"}}, "x"
    )


@pytest.fixture
def programs(tmp_path):
    try:
        installed = Environment.of("llama.cpp").installed()
    except UserError as error:  # pragma: no cover - the adapter is part of quern
        pytest.skip(str(error))
    if installed is None:
        pytest.skip("llama.cpp is not installed (quern peers install llama.cpp)")
    return Programs(tmp_path)


def test_the_bundled_model_is_mixed_as_by_llama_quantize(programs, tmp_path):
    source = tmp_path / "source.gguf"
    export(BUNDLED, source)
    for mix in MIXES:
        ours = tmp_path / f"ours_{mix}.gguf"
        quantize(BUNDLED, ours, recipe=nearest(mix), format="gguf", threads=1)
        assert types(ours) == programs.types(source, mix), mix


def test_the_table_is_what_llama_quantize_makes(programs, tmp_path):
    model = "qwen3, 24 layers, 4 heads of 1"
    source = tmp_path / "source.gguf"
    export(write_model(tmp_path / "model", MODELS[model]), source)
    for mix in ("q3_k_m", "q4_k_s", "iq4_xs"):
        assert programs.types(source, mix) == TABLE[model][mix], mix


def test_files_say_llama_cpps_number_of_their_mix(tmp_path):
    """Without llama.cpp: by the table."""
    name = "llama, 16 layers, 4 heads of 4"
    model = write_model(tmp_path / "model", MODELS[name])
    for mix in ("q3_k_l", "q4_k_m", "q5_k_s"):
        file = tmp_path / f"{mix}.gguf"
        quantize(model, file, recipe=nearest(mix), format="gguf", threads=1)
        assert types(file) == TABLE[name][mix]

"""quern-run for 64-bit ARM under qemu: NEON's kernels give the bits of the scalar ones, and of the cpu engine on this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import INT8, small_recipe
from run_programs import ROOT, Program, build, missing, tool
from tiny_model import tiny_config, write_model

from quern.engines.cpu import CpuEngine
from quern.pipeline.export import export
from quern.pipeline.quantize import quantize

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SETS = ["i8mm", "neon", "scalar"]
"""Best first. The first one has the rows of the second, and panels of its own."""
THOROUGH = ("bfloat16", "4 bits asymmetric", "8 bits, groups", "whole tiles of 2 bits")
"""What every set is tried on."""
LARGEST = 2_000_000
"""Bytes that the program may have."""
PROMPT = [3, 141, 59, 26, 53, 58, 97, 93, 23, 84, 62]
COUNT = 4


@pytest.fixture(scope="session")
def arm() -> Program:
    """Started by the emulator."""
    if (reason := missing("cmake", COMPILER, EMULATOR)) is not None:
        pytest.skip(reason)
    folder = build("run-tests-aarch64", f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'cmake/aarch64.cmake'}")
    return Program(folder, (EMULATOR,))


def test_it_is_small_and_needs_no_libraries(arm):
    assert arm.path.stat().st_size < LARGEST
    readelf = tool("aarch64-linux-gnu-readelf") or tool("readelf")
    if readelf is None:
        pytest.skip("needs readelf")
    said = subprocess.run([readelf, "-dlh", arm.path], capture_output=True, text=True, check=True).stdout
    assert "AArch64" in said
    assert "INTERP" not in said
    assert "NEEDED" not in said


def test_the_instruction_sets_that_there_are(arm):
    assert arm.run("/dev/null", "--ids", "1", QUERN_ISA="sse").err.startswith("error: ")


# Widths that fill no register: rows end inside of one, and groups of the last columns are shorter.
NARROW = {"hidden_size": 80, "intermediate_size": 112, "head_dim": 20}
WEIGHTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bfloat16": ({"weights": {"codec": "none"}}, NARROW),
    "float32": ({"weights": {"codec": "none"}}, {**NARROW, "torch_dtype": "float32"}),
    "4 bits asymmetric": (
        {"weights": {"bits": 4, "symmetric": False, "granularity": "group", "group_size": 32}},
        NARROW,
    ),
    "4 bits, many groups": ({"weights": {"bits": 4, "granularity": "group", "group_size": 32}}, {"hidden_size": 320}),
    "4 bits, other groups": ({"weights": {"bits": 4, "granularity": "group", "group_size": 40}}, NARROW),
    "4 bits, one scale a row": ({"weights": {"bits": 4, "granularity": "channel"}}, NARROW),
    "8 bits": ({"weights": {"bits": 8, "granularity": "channel"}}, NARROW),
    "8 bits, groups": ({"weights": {"bits": 8, "granularity": "group", "group_size": 32}}, {"hidden_size": 320}),
    "2 bits": ({"weights": {"bits": 2, "granularity": "group", "group_size": 64}}, {"hidden_size": 320}),
    "nf4": ({"weights": {"codec": "nf4", "bits": 4, "granularity": "group", "group_size": 32}}, {"hidden_size": 320}),
    "trellis": ({"weights": {"codec": "trellis", "bits": 2}, "transforms": [{"method": "hadamard"}]}, {}),
    "trellis, window 6": ({"weights": {"codec": "trellis", "bits": 3, "window": 6, "tables": 1}}, NARROW),
    "trellis, two tables": ({"weights": {"codec": "trellis", "bits": 3, "window": 7, "tables": 2}}, NARROW),
    "whole tiles of 2 bits": (
        {"weights": {"codec": "trellis", "bits": 2, "window": 6, "tables": 1}},
        {"hidden_size": 256, "head_dim": 64},
    ),
    "whole tiles of 3 bits": (
        {"weights": {"codec": "trellis", "bits": 3, "window": 7, "tables": 1}},
        {"hidden_size": 256, "head_dim": 64},
    ),
    "whole tiles of 4 bits": (
        {"weights": {"codec": "trellis", "bits": 4, "window": 6, "tables": 1}},
        {"hidden_size": 256, "head_dim": 64},
    ),
    "ggml blocks": ({"weights": {"codec": "ggml", "type": "q4_k"}}, {"hidden_size": 256, "intermediate_size": 256}),
}


def logits(arm: Program, file: Path, folder: Path, isa: str, *options: object) -> bytes:
    """Of a few choices."""
    given = ",".join(map(str, PROMPT))
    place = folder / isa
    ended = arm.run(
        file, "--ids", given, "-n", COUNT, "--tokens", "--threads", 1, "--logits", place, *options, QUERN_ISA=isa
    )
    assert ended.code == 0, ended.err
    return place.read_bytes()


def expected(model: Path, **options: Any) -> bytes:
    """The same from the cpu engine."""
    session, given, rows = CpuEngine().load(model, threads=1, **options).start(), PROMPT, []
    for _ in range(COUNT):
        rows.append(session.feed(given).numpy())
        given = [int(rows[-1].argmax())]
    return np.stack(rows).tobytes()


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_kind_of_weights_is_the_same_everywhere(arm, name, tmp_path, tiny_text):
    choices, changes = WEIGHTS[name]
    config = tiny_config(num_hidden_layers=1, eos_token_id=None, **changes)
    model = write_model(tmp_path / "model", config)
    if choices["weights"] != {"codec": "none"}:
        recipe = small_recipe(embedding=INT8, **choices)
        model = quantize(model, tmp_path / "out", recipe=recipe, calibration=[tiny_text], threads=1).path
    file = export(model, tmp_path / "model.run", format="run").path
    wanted = expected(model)
    for isa in SETS if name in THOROUGH else SETS[:1]:
        assert logits(arm, file, tmp_path, isa) == wanted, isa


@pytest.mark.parametrize("cache", ["float32", "int8", "int4"])
def test_every_cache_is_the_same_everywhere(arm, cache, tmp_path):
    model = write_model(tmp_path / "model", tiny_config("qwen2", num_hidden_layers=1, eos_token_id=None))
    file = export(model, tmp_path / "model.run", format="run").path
    wanted = expected(model, cache=cache)
    for isa in SETS[1:]:
        assert logits(arm, file, tmp_path, isa, "--cache", cache) == wanted, isa


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_every_activation_is_the_same_everywhere(arm, activation, tmp_path):
    config = tiny_config("llama", num_hidden_layers=1, eos_token_id=None, hidden_act=activation)
    model = write_model(tmp_path / "model", config)
    file = export(model, tmp_path / "model.run", format="run").path
    wanted = expected(model)
    for isa in SETS[1:]:
        assert logits(arm, file, tmp_path, isa) == wanted, isa

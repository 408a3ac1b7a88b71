"""The bytes of the quern format, version 1. A change here breaks every artifact that exists: it needs a new version.

``integer_parts.json`` holds one small matrix under every scheme, as hexadecimal little-endian bytes of the parts. The cases
below spell out single rows by hand, each with the rounding that it is about.
"""

import json
from pathlib import Path

import pytest
import torch
from artifacts import small_recipe
from tiny_model import tiny_config

from quern.architectures.base import architecture_of
from quern.codecs.base import CODECS
from quern.core.scheme import CodecScheme, parse_scheme
from quern.formats.base import FORMATS
from quern.pipeline.blockwise.job import plan_of

FOLDER = Path(__file__).parent
PARTS = json.loads((FOLDER / "integer_parts.json").read_text("utf-8"))
GRANULARITIES = {
    "tensor": {"granularity": "tensor"},
    "channel": {"granularity": "channel"},
    "group4": {"group_size": 4},
}


def matrix() -> torch.Tensor:
    """Five rows of ten sixteenths, by a formula and not by a random generator; one row is zero, one is constant."""
    rows = [[(37 * r * r + 11 * c * (c + 3) + 5 * r * c) % 64 - 32 for c in range(10)] for r in range(5)]
    rows[2], rows[4] = [0] * 10, [-3] * 10
    return torch.tensor(rows) / 16.0 * torch.tensor([[1.0], [0.125], [1.0], [4.0], [1.0]])


def scheme(key: str) -> CodecScheme:
    bits, sign, granularity = key.split(" ")
    return parse_scheme(
        {"bits": int(bits), "symmetric": sign == "symmetric", "observer": "min_max", **GRANULARITIES[granularity]}
    )


def stored(weight: torch.Tensor, how: CodecScheme) -> dict[str, torch.Tensor]:
    codec = CODECS.get("integer")(how)
    encoder = codec.encoder(weight, weight, refit=False)
    encoder.round_all(weight)
    return codec.join([encoder.parts()])


def hexadecimal(part: torch.Tensor) -> str:
    return part.numpy().tobytes().hex()


def test_the_table_has_every_scheme():
    keys = {f"{b} {s} {g}" for b in range(1, 9) for s in ("symmetric", "asymmetric") for g in GRANULARITIES}
    assert set(PARTS) == keys


@pytest.mark.parametrize("key", PARTS)
def test_parts_have_the_recorded_bytes(key):
    assert {name: hexadecimal(part) for name, part in stored(matrix(), scheme(key)).items()} == PARTS[key]


CASES = {
    # Greatest |w| is 7.5 = 15 x scale / 2, so the scale is 1. -7.5 is a tie between codes 0 (-8) and 1 (-7): even wins.
    # +7.5 is a tie between 7 and 8, even would be 8, which does not exist: clamped to 7.
    "both ends are ties, the upper one is clamped": ("4 symmetric channel", [-7.5, 7.5, 0.0, 1.0], {
        "codes": "f0980000", "scale": "003c"}),
    # .5 -> 0, 1.5 -> 2, 2.5 -> 2, -.5 -> 0, -1.5 -> -2 (plus 8 each); 7.5 only fixes the scale at 1.
    "ties go to the even code": ("4 symmetric channel", [0.5, 1.5, 2.5, -0.5, -1.5, 7.5], {
        "codes": "a88a f600".replace(" ", ""), "scale": "003c"}),
    # [0, 15]: zero lies at the end of the range, so the zero point is 0 and no code is lost.
    "only positive values need no zero point": ("4 asymmetric channel", [0.0, 15.0, 7.0, 0.5], {
        "codes": "f0070000", "scale": "003c", "zero_point": "00000000"}),
    # [5, 20] is widened to [0, 20], because zero must be on the grid: scale 20 / 15 rounded to float16 (0x3d55 = 1.33301).
    "the range always reaches zero": ("4 asymmetric channel", [5.0, 20.0], {
        "codes": "f4000000", "scale": "553d", "zero_point": "00000000"}),
    # [-2.5, 12.5]: scale 1, zero point round(2.5) = 2 (even), so -2.5 -> round(-2.5) + 2 = 0, 12.5 -> 12 + 2 = 14.
    "zero points round half to even": ("4 asymmetric channel", [-2.5, 12.5], {
        "codes": "e0000000", "scale": "003c", "zero_point": "02000000"}),
    # Symmetric 8-bit codes are signed bytes, code - 128. Greatest |w| 127.5, scale 1: -127.5 -> -128 (even), 127.5 -> 127 (clamped).
    "eight bits are plain bytes": ("8 symmetric channel", [-127.5, 127.5, -1.0, 0.5, 1.5], {
        "codes": "807fff0002", "scale": "003c"}),
    # Three bits: code i lies at bits 3 i ...; 11 codes are 33 bits, so the last one straddles into a second word.
    "codes straddle words": ("3 symmetric channel", [3.5] * 10 + [-3.5], {
        "codes": "ffffff3f00000000", "scale": "003c"}),
    # Smaller scales than 2^-24 do not exist in float16: clamped there, and everything rounds to zero (code 8).
    "tiny values": ("4 symmetric channel", [1e-9, -1e-9], {
        "codes": "88000000", "scale": "0100"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_rounding_by_hand(name):
    key, row, expected = CASES[name]
    assert {part: hexadecimal(tensor) for part, tensor in stored(torch.tensor([row]), scheme(key)).items()} == expected


RECIPE = {
    "weights": {"bits": 4, "symmetric": False, "group_size": 64},
    "overrides": [
        {"pattern": "*.self_attn.*", "codec": "none"},
        {"pattern": "*.0.mlp.gate_proj", "codec": "none"},
        {"pattern": "*.0.mlp.down_proj", "bits": 8, "granularity": "channel"},
    ],
    "head": {"bits": 8, "granularity": "channel"},
    "rounding": {"method": "gptq"},
}


@pytest.mark.parametrize("name", ["compressed-tensors", "quern"])
def test_quantization_config(name):
    """What config.json says. The recipe is spelled out with all its defaults, so that a later quern reads it the same way."""
    recipe = small_recipe("golden", **RECIPE)
    architecture = architecture_of(tiny_config("llama", num_hidden_layers=2, tie_word_embeddings=False))
    plan = plan_of(recipe, architecture)
    config = FORMATS.get(name).writer(recipe, plan, architecture).quantization_config(plan)
    assert config == json.loads((FOLDER / f"quantization_config_{name}.json").read_text("utf-8"))

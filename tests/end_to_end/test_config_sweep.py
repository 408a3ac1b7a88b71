"""Variants of configurations: transformers, both engines, a folder and the GGUF of the same model compute the same.

``ROWS`` is a table; a row is a family and what its configuration says besides ``tiny_config``. Rows that only change how a
model computes are shown to change it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from gguf_model import write_gguf
from tiny_model import tiny_config, write_model

from quern.engines.cpu import CpuEngine
from quern.engines.reference import load as load_reference


def text(length: int) -> torch.Tensor:
    return torch.randint(0, 296, (1, length), generator=torch.Generator().manual_seed(8))


SAME = 1e-6
"""Nats. Sums of float32 of up to 200 terms are off by 200 x 2^-24 = 1e-5 of their size, a KL goes with the square of that
times the logits' variance, and what is summed over the vocabulary in float32 adds some 1e-8."""
MATTERS = 1e-4
SMALL = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "head_dim": 12}
SHAPES = {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
          "num_hidden_layers", "tie_word_embeddings", "attention_bias", "mlp_bias"}  # fmt: skip
"""Keys that decide which tensors there are."""


class Row(NamedTuple):
    """One variant."""

    family: str
    changes: dict[str, Any] = {}
    gguf: bool = True
    """Whether a GGUF can hold such a model."""
    length: int = 100
    """Tokens of the text."""
    without: dict[str, Any] | None = None
    """What ``changes`` are compared with to show that they matter; None: without them."""
    matters: bool = True
    """Whether they change anything within the model's context."""


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


LLAMA3 = {
    "max_position_embeddings": 32768,
    **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
}
SHORT_LLAMA3 = rope(
    "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
LONGROPE = rope(
    "longrope", factor=2.0, original_max_position_embeddings=64, short_factor=[1.0] * 6,
    long_factor=[1.0, 1.3, 1.9, 2.7, 4.0, 6.0],
)  # fmt: skip
OLD_STYLE = {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
MIXED = {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]}
EVERY = {"use_sliding_window": True, "sliding_window": 24, "layer_types": ["sliding_attention"] * 2}
ODD = {"hidden_size": 51, "intermediate_size": 77, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 14,
       "vocab_size": 301}  # fmt: skip

ROWS: dict[str, Row] = {
    "llama": Row("llama"),
    "llama without biases": Row("llama", {"attention_bias": False}),
    "llama, biases in the MLP": Row("llama", {"mlp_bias": True}),
    "llama, biases in the MLP only": Row("llama", {"mlp_bias": True, "attention_bias": False}),
    "llama, head of its own": Row("llama", {"tie_word_embeddings": False}),
    "llama, one key head": Row("llama", {"num_key_value_heads": 1}),
    "llama, all key heads": Row("llama", {"num_key_value_heads": 4}),
    "llama, wide heads": Row("llama", {"head_dim": 32}),
    "llama, narrow heads": Row("llama", {"head_dim": 6}),
    "llama, one head": Row("llama", {"num_attention_heads": 1, "num_key_value_heads": 1}),
    "llama, odd sizes": Row("llama", ODD),
    "llama, one layer": Row("llama", {"num_hidden_layers": 1}),
    "llama, other base": Row("llama", rope("default", rope_theta=500000.0)),
    "llama, linear": Row("llama", rope("linear", factor=4.0)),
    "llama, old style of scaling": Row("llama", OLD_STYLE),
    "llama, yarn": Row("llama", rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "llama, yarn with other limits": Row(
        "llama", rope("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=16.0, beta_slow=2.0)
    ),
    "llama 3": Row("llama", LLAMA3),
    "llama 3, long text": Row("llama", LLAMA3, length=2300),
    "llama 3, other constants": Row("llama", SHORT_LLAMA3),
    "llama, dynamic": Row("llama", rope("dynamic", factor=2.0), gguf=False, matters=False),
    "llama, longrope": Row("llama", LONGROPE, gguf=False),
    "llama, longrope, short text": Row("llama", LONGROPE, gguf=False, length=60),
    "llama, the other tanh gelu": Row("llama", {"hidden_act": "gelu_new"}, gguf=False),
    "llama, window that the family ignores": Row("llama", {"sliding_window": 8}, gguf=False, matters=False),
    "llama, large eps": Row("llama", {"rms_norm_eps": 0.1}),
    "llama, gelu": Row("llama", {"hidden_act": "gelu"}, gguf=False),
    "llama, tanh gelu": Row("llama", {"hidden_act": "gelu_pytorch_tanh"}, gguf=False),
    "llama, swish": Row("llama", {"hidden_act": "swish"}, without={"hidden_act": "gelu"}),
    "mistral": Row("mistral"),
    "mistral, window": Row("mistral", {"sliding_window": 20}),
    "mistral, window of one": Row("mistral", {"sliding_window": 1}),
    "mistral, window beyond the text": Row("mistral", {"sliding_window": 100}, without={"sliding_window": 8}),
    "mistral, wide heads and head of its own": Row("mistral", {"head_dim": 32, "tie_word_embeddings": False}),
    "mistral, one key head and odd sizes": Row("mistral", ODD),
    "mistral, yarn": Row("mistral", rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "mistral, base of a million": Row("mistral", rope("default", rope_theta=1e6)),
    "qwen2": Row("qwen2"),
    "qwen2, head of its own": Row("qwen2", {"tie_word_embeddings": False}),
    "qwen2, all key heads": Row("qwen2", {"num_key_value_heads": 4}),
    "qwen2, wide heads": Row("qwen2", {"head_dim": 32}),
    "qwen2, odd sizes": Row("qwen2", ODD),
    "qwen2, windows in some layers": Row("qwen2", MIXED),
    "qwen2, windows in all layers": Row("qwen2", EVERY),
    "qwen2, windows from a layer on": Row(
        "qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, gguf=False
    ),
    "qwen2, window that is not used": Row("qwen2", {"use_sliding_window": False, "sliding_window": 8}, without=EVERY),
    "qwen2, yarn": Row("qwen2", rope("yarn", factor=2.0, original_max_position_embeddings=64)),
    "qwen2, linear": Row("qwen2", rope("linear", factor=2.0)),
    "qwen2, base of a million": Row("qwen2", rope("default", rope_theta=1e6)),
    "qwen2, large eps": Row("qwen2", {"rms_norm_eps": 0.01}),
    "qwen3": Row("qwen3"),
    "qwen3 without biases": Row("qwen3", {"attention_bias": False}),
    "qwen3, head of its own": Row("qwen3", {"tie_word_embeddings": False}),
    "qwen3, wide heads": Row("qwen3", {"head_dim": 32}),
    "qwen3, one key head": Row("qwen3", {"num_key_value_heads": 1}),
    "qwen3, odd sizes": Row("qwen3", ODD),
    "qwen3, windows in some layers": Row("qwen3", MIXED),
    "qwen3, windows in some layers and longrope": Row("qwen3", {**MIXED, **LONGROPE}, gguf=False),
    "qwen3, yarn": Row("qwen3", rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "qwen3, large eps": Row("qwen3", {"rms_norm_eps": 0.1}),
}


def settings_of(row: Row) -> dict[str, Any]:
    return tiny_config(row.family, torch_dtype="float32", **{**SMALL, **row.changes})


def transformers_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean of KL(reference || other) over positions, in nats, in float64."""
    first, second = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((first.exp() * (first - second)).sum(-1).mean())


@pytest.mark.parametrize("name", ROWS)
def test_all_readers_and_engines_agree(name, tmp_path):
    row = ROWS[name]
    config, ids = settings_of(row), text(row.length)
    folder = write_model(tmp_path / "model", config, tokenizer=False)
    expected = transformers_logits(folder, ids)
    found = {
        "reference, folder": load_reference(folder).logits(ids),
        "cpu, folder": CpuEngine().load(folder, cache="float32").logits(ids),
    }
    if row.gguf:
        (file,) = write_gguf(folder, tmp_path / "model.gguf")
        found["reference, GGUF"] = load_reference(file).logits(ids)
        found["cpu, GGUF"] = CpuEngine().load(file, cache="float32").logits(ids)
    assert {how: kl for how, logits in found.items() if not (kl := divergence(expected, logits)) < SAME} == {}
    if row.changes and row.matters and not set(row.changes) & SHAPES:
        other = {**tiny_config(row.family, torch_dtype="float32", **SMALL), **(row.without or {})}
        (folder / "config.json").write_text(json.dumps(other), "utf-8")
        assert divergence(expected, transformers_logits(folder, ids)) > MATTERS


def test_the_comparison_can_fail(tmp_path):
    """Another bias in one layer is more than what is allowed, and NaN is not little."""
    ids = text(100)
    folder = write_model(tmp_path / "one", settings_of(ROWS["llama"]), tokenizer=False)
    other = write_model(tmp_path / "two", settings_of(ROWS["llama"]), seed=1, tokenizer=False)
    assert divergence(transformers_logits(folder, ids), transformers_logits(other, ids)) > MATTERS > SAME
    assert not divergence(torch.zeros(1, 2, 3), torch.full((1, 2, 3), float("nan"))) < SAME

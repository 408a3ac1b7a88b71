"""``genai_config.json``: how onnxruntime-genai runs the model (https://onnxruntime.ai/docs/genai/reference/config.html)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quern.architectures.gated_decoder import GatedDecoder
from quern.formats.onnx_files.decoder import INPUTS, OUTPUTS, head_size

FILE = "genai_config.json"
MAXIMUM_LENGTH = 4096
"""Tokens that keys and values get room for at the start, where the model's context is longer and nobody says otherwise."""


def genai_config(
    architecture: GatedDecoder, model: str, ends: Sequence[int], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """For the file ``model``. ``ends``: tokens that end a text; ``defaults``: generation_config.json, or nothing."""
    config, context = architecture.config, int(architecture.config.max_position_embeddings)
    said: dict[str, Any] = {"context_length": context, "type": architecture.model_type, "vocab_size": config.vocab_size}
    padding = next((n for n in (_token(config.pad_token_id), *ends) if n is not None), 0)
    said |= {"eos_token_id": list(ends) or padding, "pad_token_id": padding}
    if (begin := _token(config.bos_token_id)) is not None:
        said["bos_token_id"] = begin
    said["decoder"] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": model,
        "head_size": head_size(architecture),
        "hidden_size": config.hidden_size,
        "inputs": INPUTS,
        "outputs": OUTPUTS,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": architecture.layers,
        "num_key_value_heads": config.num_key_value_heads,
    }
    search: dict[str, Any] = {
        "do_sample": bool(defaults.get("do_sample", False)),
        "max_length": min(context, MAXIMUM_LENGTH),
    }
    for key, kind in (("temperature", float), ("top_p", float), ("top_k", int), ("repetition_penalty", float)):
        if isinstance(value := defaults.get(key), int | float) and not isinstance(value, bool):
            search[key] = kind(value)
    return {"model": said, "search": {**search, "past_present_share_buffer": True}}


def _token(value: object) -> int | None:
    return value if type(value) is int else None

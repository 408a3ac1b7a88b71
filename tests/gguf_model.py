"""A Hugging Face folder as a GGUF, written as llama.cpp's converter lays it out; in one file or in several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from bad_files.corpus import gguf_name, interleave
from safetensors.torch import load_file

F32 = gguf.GGMLQuantizationType.F32


def write_gguf(
    folder: Path, path: Path, *, kind: gguf.GGMLQuantizationType = F32, parts: list[int] | None = None
) -> list[Path]:
    """The GGUF of ``folder`` (matrices stored as ``kind``), and the files that it has.

    With ``parts`` the tensors are cut into as many files, so many in each; ``path`` is then how their names begin.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    tensors = _tensors(folder, config)
    if parts is None:
        _write(path, config, tensors, kind, folder, None)
        return [path]
    assert sum(parts) == len(tensors)
    written, names = [], list(tensors)
    for number, count in enumerate(parts):
        part = path.with_name(f"{path.name}-{number + 1:05d}-of-{len(parts):05d}.gguf")
        first = sum(parts[:number])
        chosen = {name: tensors[name] for name in names[first : first + count]}
        _write(part, config, chosen, kind, folder, (number, len(parts), len(tensors)))
        written.append(part)
    return written


def tensor_count(folder: Path) -> int:
    """Tensors of the GGUF of ``folder``."""
    return len(_tensors(folder, json.loads((folder / "config.json").read_text("utf-8"))))


def _architecture(config: dict[str, Any]) -> str:
    return {"mistral": "llama"}.get(config["model_type"], config["model_type"])


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    return {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def _tensors(folder: Path, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """By llama.cpp's names, rows of a Llama's q and k in its order, and the factors of Llama 3's frequencies."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            values = tensor.float().numpy()
            if _architecture(config) == "llama" and (".q_proj." in name or ".k_proj." in name):
                heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
                values = interleave(values, heads)
            tensors[gguf_name(name)] = np.ascontiguousarray(values)
    if _rope(config).get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = _llama3_factors(config)
    return tensors


def _llama3_factors(config: dict[str, Any]) -> np.ndarray:
    """What llama.cpp divides the frequencies by (the formula of the Llama 3 code, term by term)."""
    rope = _rope(config)
    size, theta = config["head_dim"], rope.get("rope_theta") or config["rope_theta"]
    factors = []
    for pair in range(size // 2):
        wavelength = 2 * np.pi * theta ** (2 * pair / size)
        turns = rope["original_max_position_embeddings"] / wavelength
        if turns > rope["high_freq_factor"]:
            factors.append(1.0)
        elif turns < rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            smooth = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def _write(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    kind: gguf.GGMLQuantizationType,
    folder: Path,
    split: tuple[int, int, int] | None,
) -> None:
    writer = gguf.GGUFWriter(path, _architecture(config))
    if split is not None:
        number, count, total = split
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", total)
    if split is None or split[0] == 0:
        _add_metadata(writer, config)
        if (folder / "tokenizer.json").is_file():
            _add_tokenizer(writer, config, json.loads((folder / "tokenizer.json").read_text("utf-8")))
            settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
            if "chat_template" in settings:
                writer.add_chat_template(settings["chat_template"])
    for name, values in tensors.items():
        stored = kind if values.ndim == 2 else F32
        writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    rope = _rope(config)
    if config["model_type"] == "mistral":
        writer.add_name("Some Mistral 7B")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta", 10000.0))
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_rope_dimension_count(config["head_dim"])
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "beta_fast" in rope:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        if "beta_slow" in rope:
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        writer.add_sliding_window(config["sliding_window"])
        if "layer_types" in config:
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    for key, add in (("bos_token_id", writer.add_bos_token_id), ("eos_token_id", writer.add_eos_token_id)):
        if config.get(key) is not None:
            add(config[key])


def _add_tokenizer(writer: gguf.GGUFWriter, config: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    """A byte-level BPE tokenizer; rows of the embedding that no token has get names of their own."""
    words = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in tokenizer["added_tokens"]}
    tokens, kinds = [], []
    for index in range(config["vocab_size"]):
        entry = added.get(index)
        tokens.append(entry["content"] if entry else words.get(index, f"[PAD{index}]"))
        if entry:
            kinds.append(gguf.TokenType.CONTROL if entry["special"] else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL if index in words else gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])

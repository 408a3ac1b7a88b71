"""GGUF files of Qwen2 shapes with random blocks, for timing llama.cpp without quantizing anything.

Speed depends on types and shapes, not on what the codes are; but blocks' float16 numbers are such that weights have the size
of trained ones, since values that overflow make a decoder take other ways (quern computes a text again whose keys or values
float16 cannot hold). Types follow llama-quantize: the head (and an embedding that is the head) in Q6_K, or Q5_K for the IQ
types; where a row is no multiple of 256, the fallback types that it would take.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

TYPES = gguf.GGMLQuantizationType
FALLBACK = {
    "Q2_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ2_XXS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
}
"""llama_tensor_get_type's choices for rows that are no multiple of 256."""
NUMBERS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)} | dict.fromkeys(("Q4_K", "Q5_K", "Q4_1", "Q5_1"), (0, 2))
"""Where the float16 numbers of a block lie; those of other types have one at its beginning."""


def random_blocks(
    generator: np.random.Generator, rows: int, columns: int, kind: gguf.GGMLQuantizationType
) -> np.ndarray:
    """Rows of random codes (uint8), whose values have a root mean square of ``columns ** -.5``."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (rows * columns // block, size), np.uint8)
    places = NUMBERS.get(kind.name, (0,))

    def write(number: float) -> None:
        for at in places:
            blocks[:, at : at + 2] = np.frombuffer(np.float16(number).tobytes(), np.uint8)

    write(1.0)
    values = gguf.quants.dequantize(blocks[:256], kind)
    write(1 / (np.sqrt(np.square(values).mean()) * np.sqrt(columns)))
    return blocks.reshape(rows, -1)


def type_for(kind: str, columns: int) -> gguf.GGMLQuantizationType:
    """The type that a tensor of rows of ``columns`` gets when ``kind`` is asked for."""
    block, _ = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    return TYPES[kind if columns % block == 0 else FALLBACK[kind]]


def write_gguf(
    path: Path, config: dict[str, Any], kind: str, seed: int = 0, tokens: Sequence[str] | None = None
) -> Path:
    """A model of ``config`` (keys of a Qwen2 config.json) whose linears are of ``kind``; Q4_K_M mixes in Q6_K.

    ``tokens``: what its tokens are in GPT-2's alphabet of bytes, which no merges join; None: it has no tokenizer.
    """
    generator = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "qwen2")
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, pairs, vocabulary = config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(pairs)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(vocabulary)
    if tokens is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(list(tokens))
        writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
        writer.add_token_merges(["a b"])
        writer.add_add_bos_token(False)
    base = "Q4_K" if kind == "Q4_K_M" else kind

    def matrix(name: str, rows: int, columns: int, wanted: str) -> None:
        found = type_for(wanted, columns)
        writer.add_tensor(name, random_blocks(generator, rows, columns, found), raw_dtype=found)

    def vector(name: str, size: int) -> None:
        writer.add_tensor(name, np.ones(size, np.float32))

    table = "Q5_K" if kind.startswith("IQ") else "Q6_K"
    tied = config["tie_word_embeddings"]
    matrix("token_embd.weight", vocabulary, hidden, table if tied else base)
    if not tied:
        matrix("output.weight", vocabulary, hidden, table)
    vector("output_norm.weight", hidden)
    width, narrow = heads * (hidden // heads), pairs * (hidden // heads)
    for layer in range(layers):
        more = kind == "Q4_K_M" and (layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2)
        finer = "Q6_K" if more else base
        prefix = f"blk.{layer}."
        vector(prefix + "attn_norm.weight", hidden)
        vector(prefix + "ffn_norm.weight", hidden)
        for name, rows in (("attn_q", width), ("attn_k", narrow), ("attn_v", narrow)):
            matrix(f"{prefix}{name}.weight", rows, hidden, finer if name == "attn_v" else base)
            vector(f"{prefix}{name}.bias", rows)
        matrix(prefix + "attn_output.weight", hidden, width, base)
        matrix(prefix + "ffn_gate.weight", inner, hidden, base)
        matrix(prefix + "ffn_up.weight", inner, hidden, base)
        matrix(prefix + "ffn_down.weight", hidden, inner, finer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

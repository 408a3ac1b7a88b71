"""The part of the corpus that is GGUF: a good file of which some bytes are overwritten. ``ALL`` is the whole corpus."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from bad_files.corpus import (
    CASES,
    CONFIG,
    HEADS,
    HIDDEN,
    VOCABULARY,
    Case,
    case,
    good_gguf,
    weights,
    write_gguf,
)

GGUF_NAME = "model.gguf"


def patch(name: str, says: str, offset: int, form: str, *values: Any) -> None:
    """Register a case that packs ``values`` over the bytes at ``offset`` of a good GGUF."""

    def build(folder: Path) -> Path:
        path = good_gguf(folder / GGUF_NAME)
        raw = bytearray(path.read_bytes())
        struct.pack_into(form, raw, offset, *values)
        path.write_bytes(raw)
        return path

    CASES.append(Case(f"GGUF: {name}", build, GGUF_NAME, says))


def splice(name: str, says: str, find: bytes, skip: int, form: str, *values: Any) -> None:
    """Register a case that packs ``values`` ``skip`` bytes after the first occurrence of ``find``."""

    def build(folder: Path) -> Path:
        path = good_gguf(folder / GGUF_NAME)
        raw = bytearray(path.read_bytes())
        at = raw.index(find)
        struct.pack_into(form, raw, at + len(find) + skip, *values)
        path.write_bytes(raw)
        return path

    CASES.append(Case(f"GGUF: {name}", build, GGUF_NAME, says))


patch("wrong magic", "not a GGUF", 0, "4s", b"GGML")
patch("version 1", "version 1", 4, "<I", 1)
patch("big-endian", "big-endian", 4, ">I", 3)
patch("2^64 - 1 tensors", "tensors, more", 8, "<Q", (1 << 64) - 1)
patch("a thousand tensors too many", "", 8, "<Q", 1000)
patch("2^63 metadata entries", "metadata entries, more", 16, "<Q", 1 << 63)
patch("a metadata name of 2^63 bytes", "claims a metadata name", 24, "<Q", 1 << 63)
patch("a metadata name of 2000 bytes", "claims a metadata name", 24, "<Q", 2000)
patch("a metadata name that is not UTF-8", "not UTF-8", 32, "2s", b"\xff\xfe")
splice("an unknown value type", "unknown value type", b"general.architecture", 0, "<I", 77)
splice("a text of 2^62 bytes", "claims a text", b"general.architecture", 4, "<Q", 1 << 62)
splice("an array of arrays", "array of the unknown", b"tokenizer.ggml.tokens", 4, "<I", 9)
splice("an array of 2^61 texts", "claims 2305843009213693952 values", b"tokenizer.ggml.tokens", 8, "<Q", 1 << 61)
splice("an array that ends beyond the file", "", b"tokenizer.ggml.tokens", 16, "<Q", 1 << 40)
splice("a count that is a fraction", "must be one positive int", b"llama.block_count", 0, "<I", 6)
splice("no layers", "must be one positive int", b"llama.block_count", 4, "<I", 0)
splice("a rotary base that is NaN", "must be one positive float", b"llama.rope.freq_base", 4, "<f", float("nan"))
splice("heads that do not divide the rows", "rows, not pairs", b"llama.attention.head_count_kv", 4, "<I", 31)
splice("nine dimensions", "dimensions", b"token_embd.weight", 0, "<I", 9)
splice("an empty dimension", "impossible shape", b"token_embd.weight", 4, "<Q", 0)
splice("more elements than 64 bits", "impossible shape", b"token_embd.weight", 4, "<QQ", 1 << 40, 1 << 40)
splice("rows that are no whole blocks", "whole blocks", b"token_embd.weight", 4, "<Q", 65)
splice("an unknown type", "unknown type", b"token_embd.weight", 20, "<I", 250)
splice("a type that was removed", "unknown type", b"token_embd.weight", 20, "<I", 4)
splice("a tensor that is not aligned", "not a multiple", b"token_embd.weight", 24, "<Q", 33)
splice("a tensor beyond the file", "ends at byte", b"token_embd.weight", 24, "<Q", 1 << 40)
splice("overlapping tensors", "overlaps", b"output_norm.weight", 16, "<Q", 0)
splice("a tensor with a name of another family", "do not have", b"blk.0.ffn_u", -1, "1s", b"x")
splice("the same tensor twice", "twice", b"blk.1.ffn_up", -8, "1s", b"0")
splice("another architecture", "models that are read", b"general.architecture", 12, "5s", b"bloom")


@case("GGUF: truncated data", GGUF_NAME, "ends at byte")
def _truncated_gguf(folder: Path) -> Path:
    path = good_gguf(folder / GGUF_NAME)
    path.write_bytes(path.read_bytes()[:-64])
    return path


@case("GGUF: truncated header", GGUF_NAME, "")
def _truncated_gguf_header(folder: Path) -> Path:
    path = good_gguf(folder / GGUF_NAME)
    path.write_bytes(path.read_bytes()[:1000])
    return path


@case("GGUF: an empty file", GGUF_NAME, "not a GGUF")
def _empty_gguf(folder: Path) -> Path:
    (folder / GGUF_NAME).write_bytes(b"")
    return folder / GGUF_NAME


@case("GGUF: alignment 3", GGUF_NAME, "alignment")
def _alignment(folder: Path) -> Path:
    return write_gguf(
        folder / GGUF_NAME, weights(), CONFIG, extra=lambda writer: writer.add_uint32("general.alignment", 3)
    )


@case("GGUF: experts that are said but not there", GGUF_NAME, "experts")
def _experts(folder: Path) -> Path:
    def extra(writer: Any) -> None:
        writer.add_expert_count(8)
        writer.add_expert_used_count(2)

    return write_gguf(folder / GGUF_NAME, weights(), CONFIG, extra=extra)


def _rotary(name: str, says: str, factors: np.ndarray) -> None:
    @case(f"GGUF: rotary factors {name}", GGUF_NAME, says)
    def _build(folder: Path) -> Path:
        return write_gguf(
            folder / GGUF_NAME, weights(), CONFIG, extra=lambda writer: writer.add_tensor("rope_freqs.weight", factors)
        )


HALF = HIDDEN // HEADS // 2
_rotary("of 0", "not above 0", np.zeros(HALF, np.float32))
_rotary("that are NaN", "not above 0", np.full(HALF, np.nan, np.float32))
_rotary("of another size", "the head size calls for", np.ones(HALF + 1, np.float32))
_rotary("in half precision", "no list of float32", np.ones(HALF, np.float16))
_rotary("in two dimensions", "no list of float32", np.ones((HALF, 1), np.float32))


def _says(name: str, says: str, key: str, value: Any) -> None:
    """A good file whose metadata say one thing more."""

    @case(f"GGUF: {name}", GGUF_NAME, says)
    def _build(folder: Path) -> Path:
        def extra(writer: gguf.GGUFWriter) -> None:
            kind = gguf.GGUFValueType.get_type(value)
            writer.add_key_value(
                f"llama.{key}", value, kind, gguf.GGUFValueType.get_type(value[0]) if kind == 9 else None
            )

        return write_gguf(folder / GGUF_NAME, weights(), CONFIG, extra=extra)


_says("softcapped logits", "final_logit_softcapping", "final_logit_softcapping", 30.0)
_says("scaled embeddings", "embedding_scale", "embedding_scale", 12.0)
_says("attention in both directions", "attention.causal", "attention.causal", False)
_says("values of another size", "attention.value_length", "attention.value_length", 8)
_says("a part of each head rotated", "rope.dimension_count", "rope.dimension_count", 8)
_says("a scaling twice", "rope.scaling.factor", "rope.scaling.type", "linear")
_says("an unknown rotary scaling", "'dynamic'", "rope.scaling.type", "dynamic")
_says("a window that is a text", "sliding window", "attention.sliding_window", "all")
_says("a window below 0", "sliding window", "attention.sliding_window", -5)


@case("GGUF: windows for other layers than there are", GGUF_NAME, "for each of its 2 layers")
def _windows(folder: Path) -> Path:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_sliding_window(16)
        writer.add_sliding_window_pattern([True, False, True])

    return write_gguf(folder / GGUF_NAME, weights(), CONFIG, extra=extra)


@case("GGUF: windows in some layers of a llama", GGUF_NAME, "some layers only")
def _some_windows(folder: Path) -> Path:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_sliding_window(16)
        writer.add_sliding_window_pattern([True, False])

    return write_gguf(folder / GGUF_NAME, weights(), CONFIG, extra=extra)


@case("GGUF: a tensor of another family", GGUF_NAME, "do not have")
def _stranger(folder: Path) -> Path:
    extra = np.ones(HIDDEN, np.float32)
    return write_gguf(
        folder / GGUF_NAME, weights(), CONFIG, extra=lambda writer: writer.add_tensor("blk.0.attn_sinks.weight", extra)
    )


@case("GGUF: a layer less than it says", GGUF_NAME, "is missing")
def _layers(folder: Path) -> Path:
    return write_gguf(folder / GGUF_NAME, weights(), {**CONFIG, "num_hidden_layers": 3})


@case("GGUF: more tokens than rows", GGUF_NAME, "embedding")
def _tokens(folder: Path) -> Path:
    return write_gguf(folder / GGUF_NAME, weights(), {**CONFIG, "vocab_size": VOCABULARY + 1})


@case("GGUF: a scale that is infinite", GGUF_NAME, "NaN or infinite")
def _infinite_scale(folder: Path) -> Path:
    path = good_gguf(folder / GGUF_NAME)
    raw = bytearray(path.read_bytes())
    place = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.1.ffn_up.weight")
    struct.pack_into("<H", raw, place.data_offset, 0x7C00)
    path.write_bytes(raw)
    return path


ALL = tuple(CASES)

"""Small models as other tools would pack them, written from the description of each layout.

A variant packs one matrix: from its shape and a generator it makes the stored tensors under a module's name, and says what
they stand for, as float64. Codes are put together one by one, as Python integers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_model import tiny_config, write_model
from torch import Tensor

Packed = tuple[dict[str, Tensor], Tensor]
Pack = Callable[[tuple[int, int], np.random.Generator], Packed]


@dataclass(frozen=True)
class Variant:
    """One way of one tool to pack matrices."""

    config: dict[str, Any]
    """``quantization_config``."""
    pack: Pack
    granularity: str
    bits: int
    exact: bool = True
    """Whether float32 holds the values exactly; otherwise the nearest float32 is what they are."""


def words_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 ``(words, columns)`` for unsigned codes ``(count, columns)``: each column one integer, lowest code first."""
    count = -(-codes.shape[0] * bits // 32)
    columns = []
    for column in codes.T.tolist():
        whole = sum(code << (bits * position) for position, code in enumerate(column))
        columns.append(np.frombuffer(whole.to_bytes(4 * count, "little"), "<i4"))
    return np.stack(columns, axis=1)


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def scales_of(shape: tuple[int, ...], rng: np.random.Generator, dtype: torch.dtype = torch.float16) -> Tensor:
    return tensor(rng.uniform(0.002, 0.03, shape).astype(np.float32)).to(dtype)


def by_gptqmodel(bits: int) -> Variant:
    """Zero points from 0 on, of which each word as a whole lost a one in every field, so that zeros borrow."""
    plain = gptq(bits, 32, "gptq_v2")

    def pack(shape: tuple[int, int], rng: np.random.Generator) -> Packed:
        parts, value = plain.pack(shape, rng)
        lost = sum(1 << first for first in range(0, 32, bits))
        words = (parts["qzeros"].numpy().astype(np.int64) % 2**32 - lost) % 2**32
        parts["qzeros"] = tensor(words.astype(np.uint32).view(np.int32))
        return parts, value

    meta = {"checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:4.0.0"]}}
    return replace(plain, pack=pack, config={**plain.config, **meta})


def gptq(
    bits: int, group: int, form: str = "gptq", desc_act: bool = False, sym: bool = False, order: bool = True
) -> Variant:
    least = 1 if form == "gptq" else 0

    def pack(shape: tuple[int, int], rng: np.random.Generator) -> Packed:
        rows, columns = shape
        size = columns if group == -1 else group
        groups = -(-columns // size)
        codes = rng.integers(0, 2**bits, (columns, rows))
        zeros = rng.integers(least, 2**bits, (groups, rows))
        if sym:
            zeros[:] = 2 ** (bits - 1)
        index = np.arange(columns) // size
        if desc_act:
            rng.shuffle(index)
        scale = scales_of((groups, rows), rng)
        parts = {
            "qweight": tensor(words_of(codes, bits)),
            "qzeros": tensor(words_of((zeros - least).T, bits).T),
            "scales": scale,
        }
        if order:
            parts["g_idx"] = tensor(index.astype(np.int32))
        value = (codes - zeros[index]) * scale.double().numpy()[index]
        return parts, tensor(value.T)

    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": desc_act, "sym": sym, "lm_head": False,
        "checkpoint_format": form, "pack_dtype": "int32",
    }  # fmt: skip
    return Variant(config, pack, "channel" if group == -1 else f"group {group}", bits)


def awq(group: int) -> Variant:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def fields(codes: np.ndarray) -> np.ndarray:
        words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.int64)
        for place, output in enumerate(order):
            words |= codes[:, output::8] << (4 * place)
        return words.astype(np.uint32).view(np.int32)

    def pack(shape: tuple[int, int], rng: np.random.Generator) -> Packed:
        rows, columns = shape
        size = columns if group == -1 else group
        codes, zeros = rng.integers(0, 16, (columns, rows)), rng.integers(0, 16, (-(-columns // size), rows))
        scale, index = scales_of(zeros.shape, rng), np.arange(columns) // size
        parts = {"qweight": tensor(fields(codes)), "qzeros": tensor(fields(zeros)), "scales": scale}
        return parts, tensor(((codes - zeros[index]) * scale.double().numpy()[index]).T)

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Variant(config, pack, "channel" if group == -1 else f"group {group}", 4)


def fp8(block: list[int] | None, shape_of_scale: str = "block", dtype: torch.dtype = torch.float32) -> Variant:
    def pack(shape: tuple[int, int], rng: np.random.Generator) -> Packed:
        rows, columns = shape
        codes = tensor(rng.normal(0, 60, shape).astype(np.float32)).to(torch.float8_e4m3fn)
        if block is not None:
            scale = scales_of((-(-rows // block[0]), -(-columns // block[1])), rng, dtype)
            spread = scale.double().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :columns]
            return {"weight": codes, "weight_scale_inv": scale}, codes.double() * spread
        size = {"scalar": (), "one": (1,), "channel": (rows, 1)}[shape_of_scale]
        scale = scales_of(size, rng, dtype)
        parts = {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(())}
        return parts, codes.double() * scale.double()

    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "static" if block is None else "dynamic"}
    granularity = {"scalar": "tensor", "one": "tensor"}.get(shape_of_scale, shape_of_scale)
    if block is not None:
        config["weight_block_size"], granularity = block, f"block {block[0]} x {block[1]}"
    return Variant(config, pack, granularity, 8, exact=dtype != torch.float32)


def bnb4(kind: str, nested: bool, block: int = 64) -> Variant:
    def pack(shape: tuple[int, int], rng: np.random.Generator) -> Packed:
        count = shape[0] * shape[1]
        codes, blocks = rng.integers(0, 16, count), -(-count // block)
        table = np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
        padded = np.append(codes, 0)[: count + count % 2]
        parts = {
            "weight": tensor((padded[::2] << 4 | padded[1::2]).astype(np.uint8)[:, None]),
            "weight.quant_map": tensor(table),
        }
        if nested:
            inner, outer = rng.integers(0, 256, blocks), rng.uniform(0.1, 0.3, -(-blocks // 256)).astype(np.float32)
            fine, offset = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32), 0.3125
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            scale = fine[inner] * outer[np.arange(blocks) // 256] + np.float32(offset)
            parts |= {
                "weight.absmax": tensor(inner.astype(np.uint8)),
                "weight.nested_absmax": tensor(outer),
                "weight.nested_quant_map": tensor(fine),
            }
        else:
            scale = rng.uniform(0.01, 0.2, blocks).astype(np.float32)
            parts["weight.absmax"] = tensor(scale)
        raw = np.frombuffer(json.dumps(state).encode(), np.uint8)
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = tensor(raw.copy())
        value = table[codes].astype(np.float64) * scale.astype(np.float64)[np.arange(count) // block]
        return parts, tensor(value).view(shape)

    config = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True,
        "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested, "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip
    return Variant(config, pack, f"block {block}", 4, exact=False)


def bnb8() -> Variant:
    def pack(shape: tuple[int, int], rng: np.random.Generator) -> Packed:
        codes = tensor(rng.integers(-127, 128, shape).astype(np.int8))
        scale = scales_of((shape[0],), rng, torch.float32)
        parts = {"weight": codes, "SCB": scale, "weight_format": torch.zeros((), dtype=torch.uint8)}
        return parts, codes.double() * scale.double()[:, None] / 127

    return Variant({"quant_method": "bitsandbytes", "load_in_8bit": True}, pack, "channel", 8, exact=False)


def compressed(arguments: dict[str, Any], form: str, granularity: str, dtype: torch.dtype = torch.bfloat16) -> Variant:
    """By the package itself, which packs; the values are the plain product, in its float64."""

    def pack(shape: tuple[int, int], rng: np.random.Generator) -> Packed:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        (rows, columns), bits = shape, arguments["num_bits"]
        group = {"channel": columns, "tensor": columns}.get(arguments["strategy"], arguments.get("group_size"))
        height = rows if arguments["strategy"] == "tensor" else 1
        size = (rows // height, -(-columns // group))
        half = 2 ** (bits - 1)
        codes = tensor(rng.integers(-half, half, shape).astype(np.int8))
        zeros = tensor(rng.integers(-half, half, size).astype(np.int8))
        if arguments["symmetric"]:
            zeros[:] = 0
        scale = scales_of(size, rng, dtype)
        parts = {"weight_scale": scale}
        if form == "pack-quantized":
            parts |= {"weight_packed": pack_to_int32(codes, bits), "weight_shape": torch.tensor(shape)}
        else:
            parts["weight"] = codes
        if not arguments["symmetric"]:
            parts["weight_zero_point"] = pack_to_int32(zeros, bits, 0) if form == "pack-quantized" else zeros
        at = (torch.arange(rows) // height)[:, None], torch.arange(columns)[None] // group
        return parts, (codes.double() - zeros.double()[at]) * scale.double()[at]

    return Variant(_scheme(arguments, form), pack, granularity, arguments["num_bits"])


def _scheme(arguments: dict[str, Any], form: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": arguments, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip


def compressed_fp8(strategy: str) -> Variant:
    arguments = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    block = [16, 32] if strategy == "block" else None
    if block:
        arguments["block_structure"] = block

    def pack(shape: tuple[int, int], rng: np.random.Generator) -> Packed:
        inner = fp8(block, "one" if strategy == "tensor" else strategy, torch.bfloat16)
        parts, value = inner.pack(shape, rng)
        parts["weight_scale"] = parts.pop("weight_scale_inv", parts.get("weight_scale"))
        return parts, value

    granularity = "block 16 x 32" if block else strategy
    return Variant(_scheme(arguments, "float-quantized"), pack, granularity, 8)


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def compressed_fp4(form: str) -> Variant:
    group = 16 if form.startswith("nv") else 32
    arguments = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": group}

    def pack(shape: tuple[int, int], rng: np.random.Generator) -> Packed:
        codes = rng.integers(0, 16, shape)
        value = np.array(FP4)[codes % 8] * np.where(codes > 7, -1, 1)
        parts = {"weight_packed": tensor((codes[:, 1::2] << 4 | codes[:, ::2]).astype(np.uint8))}
        at = np.arange(shape[1]) // group
        if group == 32:
            powers = rng.integers(110, 124, (shape[0], -(-shape[1] // group)))
            parts["weight_scale"] = tensor(powers.astype(np.uint8))
            return parts, tensor(value * 2.0 ** (powers - 127)[:, at])
        local = tensor(rng.uniform(20, 400, (shape[0], -(-shape[1] // group))).astype(np.float32)).to(
            torch.float8_e4m3fn
        )
        whole = torch.tensor([np.float32(rng.uniform(5e3, 2e4))])
        parts |= {"weight_scale": local, "weight_global_scale": whole}
        return parts, tensor(value * local.double().numpy()[:, at] / float(whole))

    return Variant(_scheme(arguments, f"{form}-pack-quantized"), pack, f"group {group}", 4, exact=group == 32)


def _integers(bits: int, strategy: str, symmetric: bool, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, **more}


VARIANTS: dict[str, Variant] = {
    **{f"gptq {bits} bits": gptq(bits, 32) for bits in (2, 3, 4, 8)},
    "gptq symmetric": gptq(4, 32, sym=True),
    "gptq one group": gptq(4, -1),
    "gptq last group short": gptq(3, 64, desc_act=True),
    "gptq desc_act": gptq(4, 32, desc_act=True),
    "gptq without g_idx": gptq(4, 32, order=False),
    "gptq_v2": gptq(4, 32, "gptq_v2"),
    "gptq_v2 8 bits desc_act": gptq(8, 32, "gptq_v2", desc_act=True),
    **{f"gptq {bits} bits by GPTQModel": by_gptqmodel(bits) for bits in (2, 4, 8)},
    "awq": awq(32),
    "awq one group": awq(-1),
    "fp8 blocks": fp8([32, 64]),
    "fp8 blocks beyond the matrix": fp8([128, 128], dtype=torch.bfloat16),
    "fp8 scalar": fp8(None, "scalar"),
    "fp8 one": fp8(None, "one", torch.bfloat16),
    "fp8 channel": fp8(None, "channel"),
    "bitsandbytes nf4": bnb4("nf4", nested=False),
    "bitsandbytes nf4 nested": bnb4("nf4", nested=True),
    "bitsandbytes fp4 nested": bnb4("fp4", nested=True, block=128),
    "bitsandbytes int8": bnb8(),
    "compressed-tensors int4": compressed(_integers(4, "group", True, group_size=32), "pack-quantized", "group 32"),
    "compressed-tensors int4 asymmetric": compressed(
        _integers(4, "group", False, group_size=32), "pack-quantized", "group 32"
    ),
    "compressed-tensors int3": compressed(_integers(3, "group", False, group_size=32), "pack-quantized", "group 32"),
    "compressed-tensors int8 packed": compressed(_integers(8, "channel", True), "pack-quantized", "channel"),
    "compressed-tensors int8": compressed(_integers(8, "channel", True), "int-quantized", "channel"),
    "compressed-tensors int8 asymmetric": compressed(_integers(8, "tensor", False), "int-quantized", "tensor"),
    **{f"compressed-tensors fp8 {how}": compressed_fp8(how) for how in ("tensor", "channel", "block")},
    "compressed-tensors nvfp4": compressed_fp4("nvfp4"),
    "compressed-tensors mxfp4": compressed_fp4("mxfp4"),
}
"""One for each way that is read, except MXFP4, which packs stacks of experts."""


@dataclass(frozen=True)
class ForeignModel:
    """A folder, and what its packed weights stand for."""

    folder: Path
    values: dict[str, Tensor] = field(default_factory=dict)
    """By the name of the weight: float64."""


def write_foreign(
    folder: Path, variant: Variant, family: str = "qwen2", seed: int = 0, tokenizer: bool = False, **config: Any
) -> ForeignModel:
    """A model of ``family`` of two blocks, whose linears are packed."""
    write_model(folder, tiny_config(family, **{"num_hidden_layers": 2, **config}), seed, tokenizer)
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(seed)
    values = {}
    for name in sorted(name for name in tensors if name.endswith("_proj.weight")):
        rows, columns = tensors.pop(name).shape
        parts, values[name] = variant.pack((rows, columns), rng)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**said, "quantization_config": variant.config}), "utf-8")
    return ForeignModel(folder, values)


def plain_copy(model: ForeignModel, folder: Path) -> Path:
    """The same model unquantized: its values in float32."""
    shutil.copytree(model.folder, folder)
    said = json.loads((folder / "config.json").read_text("utf-8"))
    del said["quantization_config"]
    (folder / "config.json").write_text(json.dumps(said), "utf-8")
    tensors = load_file(folder / "model.safetensors")
    packed = tuple(f"{name.removesuffix('weight')}" for name in model.values)
    kept = {n: t for n, t in tensors.items() if not n.startswith(packed) or n.endswith("_proj.bias")}
    values = {name: value.float() for name, value in model.values.items()}
    save_file({**kept, **values}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change(model: ForeignModel | Path, folder: Path, tensors: Any = None, **quantization: Any) -> Path:
    """A copy with other tensors (``tensors`` changes them in place) and other settings in ``quantization_config``."""
    source = model if isinstance(model, Path) else model.folder
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    stored = load_file(source / "model.safetensors")
    if tensors is not None:
        tensors(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text("utf-8"))
    said["quantization_config"] |= quantization
    (folder / "config.json").write_text(json.dumps(said), "utf-8")
    return folder


def write_mxfp4(folder: Path, shape: tuple[int, int, int] = (3, 40, 2), seed: int = 0) -> dict[str, Tensor]:
    """A folder with one stack of experts ``(experts, rows, groups)``; its stored tensors."""
    rng = np.random.default_rng(seed)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {
        f"{name}_blocks": tensor(rng.integers(0, 256, (*shape, 16)).astype(np.uint8)),
        f"{name}_scales": tensor(rng.integers(100, 140, shape).astype(np.uint8)),
        f"{name}_bias": torch.zeros(shape[:2], dtype=torch.bfloat16),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = {"model_type": "gpt_oss", "num_hidden_layers": 1, "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(said), "utf-8")
    return tensors

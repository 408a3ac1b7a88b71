"""Make a checkpoint of any shape with random weights, for measuring time and memory where the model itself does not fit.

    python tools/make_synthetic_checkpoint.py qwen2.5-72b OUT [--layers N] [--seed 0] [--tokenizer FOLDER] [--shards]
    python tools/make_synthetic_checkpoint.py path/to/config.json OUT

OUT gets config.json, a tokenizer of bytes (or that of FOLDER) and synthetic.json, from which quern draws each tensor when it
reads it: nothing else lies on the disk. With --shards the weights are written too, one safetensors file for each block, as a
model that anything loads. The weights have what makes trained ones hard to quantize:

- heavy tails: Student's t with four degrees of freedom
- outlier channels: the same few channels have large norm weights in every block
- large biases of a few key channels, as Qwen2 has
- massive activations at the first tokens: the second block's attention writes into one channel, which is averaged away where
  many tokens are attended to and whole where few are; two neurons square it and write it into another channel

What comes out is noise: a loss measured on such a model says nothing about a trained one.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quern.architectures.base import Architecture, architecture_of
from quern.checkpoint.checkpoint import open_checkpoint
from quern.checkpoint.folder import CONFIG, INDEX
from quern.checkpoint.safetensors_file import METADATA, write_safetensors
from quern.checkpoint.synthetic import SYNTHETIC, VERSION, Description, DrawnTensor
from quern.checkpoint.tokenizer import tokenizer_files
from quern.core.seeds import generator

QWEN2 = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "max_position_embeddings": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vocab_size": 152064, "use_sliding_window": False,
}  # fmt: skip
QWEN3 = {**QWEN2, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "head_dim": 128}
QWEN3_MOE = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "max_position_embeddings": 40960,
}
MIXTRAL = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0, "max_position_embeddings": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}  # fmt: skip
LLAMA3 = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 8192, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}  # fmt: skip


def shape(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int) -> dict[str, int]:
    """The sizes of a configuration."""
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_value_heads,
    }  # fmt: skip


def routed(experts: int, per_token: int, inner: int) -> dict[str, Any]:
    """What a configuration of the Qwen family says of experts."""
    return {
        "num_experts": experts, "num_experts_per_tok": per_token, "moe_intermediate_size": inner, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip


KNOWN: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {**QWEN2, **shape(896, 4864, 24, 14, 2), "vocab_size": 151936, "tie_word_embeddings": True},
    "qwen2.5-1.5b": {**QWEN2, **shape(1536, 8960, 28, 12, 2), "vocab_size": 151936, "tie_word_embeddings": True},
    "qwen2.5-7b": {**QWEN2, **shape(3584, 18944, 28, 28, 4)},
    "qwen2.5-14b": {**QWEN2, **shape(5120, 13824, 48, 40, 8)},
    "qwen2.5-32b": {**QWEN2, **shape(5120, 27648, 64, 40, 8)},
    "qwen2.5-72b": {**QWEN2, **shape(8192, 29568, 80, 64, 8)},
    "qwen3-8b": {**QWEN3, **shape(4096, 12288, 36, 32, 8)},
    "qwen3-32b": {**QWEN3, **shape(5120, 25600, 64, 64, 8)},
    "qwen3-30b-a3b": {**QWEN3_MOE, **shape(2048, 6144, 48, 32, 4), **routed(128, 8, 768)},
    "qwen3-235b-a22b": {**QWEN3_MOE, **shape(4096, 12288, 94, 64, 4), **routed(128, 8, 1536)},
    "qwen1.5-moe-a2.7b": {
        **QWEN2,
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "vocab_size": 151936,
        "max_position_embeddings": 8192,
        **shape(2048, 5632, 24, 16, 16),
        **routed(60, 4, 1408),
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": 5632,
    },
    "mixtral-8x7b": {**MIXTRAL, **shape(4096, 14336, 32, 32, 8), "num_local_experts": 8, "num_experts_per_tok": 2},
    "llama-3-8b": {**LLAMA3, **shape(4096, 14336, 32, 32, 8)},
    "llama-3-70b": {**LLAMA3, **shape(8192, 28672, 80, 64, 8)},
}
"""By name, the sizes that their config.json have."""
OUTLIERS, OUTLIER = 6, 8.0
"""Channels of the residual stream with large norm weights, and by how much."""
QUERY_KEY = 0.25
"""By how much queries and keys are smaller than values, so that attention looks at more than one token."""
KEY_OUTLIERS, KEY_BIAS = 8, 60.0
"""Key heads that have a channel with a large bias."""
MASSIVE_BLOCK = 1
SOURCE, MASSIVE, SQUARED = 12.0, 4.0, 4.0
"""How much more the attention writes into the channel that is squared; what a neuron writes of that; its weights."""


def main() -> None:
    """Make one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help=f"A config.json, or one of {', '.join(KNOWN)}.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, help="Fewer (or more) blocks than the configuration has.")
    parser.add_argument("--vocabulary", type=int, help="Fewer (or more) rows of embedding and head.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER")
    parser.add_argument("--shards", action="store_true")
    options = parser.parse_args()
    config = dict(KNOWN.get(options.config) or json.loads(Path(options.config).read_text("utf-8")))
    if options.layers is not None:
        config["num_hidden_layers"] = options.layers
    if options.vocabulary is not None:
        config["vocab_size"] = options.vocabulary
    make(options.output, config, options.seed, options.tokenizer)
    if options.shards:
        write_shards(options.output)


def make(folder: Path, config: dict[str, Any], seed: int = 0, tokenizer: Path | None = None) -> Path:
    """A folder with a tokenizer, of which every tensor is drawn when it is read."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        write_tokenizer(folder)
    else:
        for file in tokenizer_files(tokenizer):
            shutil.copyfile(file, folder / file.name)
    (folder / CONFIG).write_text(json.dumps(config, indent=1), "utf-8")
    described = describe(architecture_of(config), config["num_key_value_heads"], seed)
    (folder / SYNTHETIC).write_text(described.model_dump_json(exclude_defaults=True), "utf-8")
    return folder


def write_tokenizer(folder: Path) -> None:
    """A tokenizer with one token for each byte."""
    symbols = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(symbols, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def describe(architecture: Architecture, key_value_heads: int, seed: int) -> Description:
    """How the tensors of an architecture are drawn."""
    random = generator(seed, "synthetic channels")
    shapes = architecture.expected_shapes()
    channels = random.permutation(shapes["model.norm.weight"][0])[: OUTLIERS + 2].tolist()
    outliers, source, massive = channels[:OUTLIERS], channels[-2], channels[-1]
    tensors = {
        name: one(name, size, architecture.layers, key_value_heads, outliers, random) for name, size in shapes.items()
    }
    if architecture.layers > MASSIVE_BLOCK:
        add_massive(tensors, source, massive)
    return Description(version=VERSION, seed=seed, tensors=tensors)


def one(
    name: str,
    size: tuple[int, ...],
    layers: int,
    key_value_heads: int,
    outliers: list[int],
    random: np.random.Generator,
) -> DrawnTensor:
    """How a tensor of that name and shape is drawn."""
    if name.endswith("norm.weight"):
        wide = size[0] > 4 * OUTLIERS and "layernorm" in name
        rows = [(channel, OUTLIER) for channel in outliers] if wide else []
        return DrawnTensor(shape=size, distribution="normal", mean=1.0, scale=0.2, rows=rows)
    if name.endswith("k_proj.bias"):
        # Those that rotate slowest, of some heads: what they add to the attention is almost the same for all tokens.
        places = (random.permutation(key_value_heads)[:KEY_OUTLIERS] + 1) * (size[0] // key_value_heads) - 1
        signs = random.choice([-1.0, 1.0], len(places)).tolist()
        return DrawnTensor(
            shape=size, scale=1.0, rows=[(p, KEY_BIAS * s) for p, s in zip(places.tolist(), signs, strict=True)]
        )
    if len(size) == 1:
        return DrawnTensor(shape=size, scale=0.1)
    if "embed_tokens" in name:
        return DrawnTensor(shape=size, scale=0.02)
    # What is added to the residual stream is smaller the more blocks add to it (GPT-2's initialisation).
    shrink = (2 * layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        shrink = QUERY_KEY
    return DrawnTensor(shape=size, scale=float(f"{shrink * size[-1] ** -0.5:.6g}"))


def add_massive(tensors: dict[str, DrawnTensor], source: int, massive: int) -> None:
    """Let a block's attention and two of its neurons make one channel massive at the first tokens."""
    prefix = f"model.layers.{MASSIVE_BLOCK}."
    changes: dict[str, dict[str, Any]] = {
        "self_attn.o_proj.weight": {"rows": [(source, SOURCE)]},
        "mlp.gate_proj.weight": {
            "rows": [(0, 0.0), (1, 0.0)], "set": [(0, source, SQUARED), (1, source, -SQUARED)],
        },
        "mlp.up_proj.weight": {
            "rows": [(0, 0.0), (1, 0.0)], "set": [(0, source, SQUARED), (1, source, -SQUARED)],
        },
        "mlp.down_proj.weight": {"set": [(massive, 0, MASSIVE), (massive, 1, MASSIVE)]},
    }  # fmt: skip
    for name, change in changes.items():
        if prefix + name in tensors:
            tensors[prefix + name] = DrawnTensor.model_validate({**tensors[prefix + name].model_dump(), **change})


def write_shards(folder: Path) -> None:
    """The weights as safetensors files, one for each block and one for the rest, instead of their description."""
    checkpoint = open_checkpoint(folder)
    groups: dict[str, list[str]] = {}
    for name in checkpoint.names():
        parts = name.split(".")
        groups.setdefault(parts[2] if parts[1:2] == ["layers"] else "outer", []).append(name)
    weight_map: dict[str, str] = {}
    for place, names in enumerate(groups.values(), 1):
        file = f"model-{place:05}-of-{len(groups):05}.safetensors"
        write_safetensors(folder / file, {name: checkpoint.read(name) for name in names}, METADATA)
        weight_map |= dict.fromkeys(names, file)
    total = 2 * checkpoint.parameters
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=1), "utf-8")
    (folder / SYNTHETIC).unlink()


if __name__ == "__main__":
    main()

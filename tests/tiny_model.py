"""Random models that quantize in a second: any supported family, grouped-query attention, a byte-level tokenizer."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

VOCABULARY = 300
"""256 bytes, one token that ends a text, the rest merges."""
MODULES = ("textwrap.py", "shlex.py", "queue.py")
"""Modules of the standard library that serve as calibration text."""


ROUTED = ("mixtral", "qwen2_moe", "qwen3_moe")
"""Families whose blocks send tokens to experts."""


def tiny_config(family: str = "qwen2", **changes: Any) -> dict[str, Any]:
    """A ``config.json``; biases where the family has them, fewer key/value heads than heads."""
    config = {
        "model_type": family,
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 256,
        "bos_token_id": None,
        "pad_token_id": None,
        "initializer_range": 0.3,
        "torch_dtype": "bfloat16",
    }
    if family in ("llama", "qwen3"):
        config["attention_bias"] = True
    if family == "mistral":
        config["sliding_window"] = None
    if family in ROUTED:
        config |= {"num_experts_per_tok": 2, "num_local_experts" if family == "mixtral" else "num_experts": 4}
    if family in ("qwen2_moe", "qwen3_moe"):
        config |= {"moe_intermediate_size": 32, "norm_topk_prob": family == "qwen3_moe"}
    if family == "qwen2_moe":
        config["shared_expert_intermediate_size"] = 48
    return {**config, **changes}


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """A state dict in the config's dtype: matrices as transformers draws them, norms around 1, biases not zero."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in config.items() if key not in ("model_type", "torch_dtype")}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values))
    dtype = getattr(torch, config["torch_dtype"])
    state = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if tensor.dim() == 1:
            tensor = tensor + 0.2 * torch.randn_like(tensor)
        state[name] = tensor.to(dtype).contiguous()
    return state


def block_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """``random_weights`` under the names of quern's blocks: experts one by one instead of stacked."""
    found = {}
    for name, tensor in random_weights(config, seed).items():
        stem, _, last = name.rpartition(".")
        if not stem.endswith(".experts"):
            found[name] = tensor
            continue
        for expert, values in enumerate(tensor):
            if last == "gate_up_proj":
                found[f"{stem}.{expert}.gate_proj.weight"], found[f"{stem}.{expert}.up_proj.weight"] = values.chunk(2)
            else:
                found[f"{stem}.{expert}.down_proj.weight"] = values
    return found


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer with a few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 4, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([calibration_text()[:20_000]], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


def calibration_text() -> str:
    """Source text that every Python carries."""
    library = Path(sysconfig.get_path("stdlib"))
    return "\n".join((library / name).read_text("utf-8") for name in MODULES)


def write_model(folder: Path, config: dict[str, Any] | None = None, seed: int = 0, tokenizer: bool = True) -> Path:
    """A Hugging Face folder with ``config``, seeded weights and a tokenizer; its path."""
    from safetensors.torch import save_file

    config = config or tiny_config()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(random_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    if tokenizer:
        write_tokenizer(folder)
    return folder

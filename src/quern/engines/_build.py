"""A model of transformers' own class from a checkpoint of any kind: weights are read one by one into their places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quern.architectures.base import Source, architecture_of, parameter_reader
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.head import EMBEDDING, HEAD
from quern.checkpoint.safetensors_file import DTYPES
from quern.core.artifact import quantization_of
from quern.core.errors import UserError
from quern.core.machine.products import use_products
from quern.engines._modules import PackedWeight, QuantizedEmbedding, QuantizedLinear, TiedHead
from quern.formats.base import StoredModule, reader_of
from quern.loading.fitting import model_config


def build(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The model of a fitting checkpoint (``quern.loading``), unquantized or in quern's format, on the CPU.

    ``dtype``: of activations and of what is not packed. Apart from the model, memory for one tensor. Raises
    ``BadFileError`` where a file cannot be read, ``UserError`` where memory does not suffice.
    """
    architecture = architecture_of(model_config(checkpoint))
    model = architecture.build_model(dtype)
    reader = reader_of(quantization_of(checkpoint.config), architecture)
    modules = {} if reader is None else reader.plan()
    insert_packed(model, modules, dtype)
    # The only buffers that are computed and not stored.
    model.model.rotary_emb = architecture.build_rotary()
    tied = model.config.tie_word_embeddings
    packed = {f"{module}.{part}" for module in modules for part in dict(model.get_submodule(module).named_buffers())}
    joined = parameter_reader(checkpoint.read)
    for name in model.state_dict():
        if name in packed or (tied and name == HEAD):
            continue
        sources = architecture.sources_of(name) if reader is None else (Source(name),)
        _put(model, name, joined(sources), dtype)
    for module in modules:
        assert reader is not None
        for part, tensor in reader.parts(checkpoint, module).items():
            _put(model, f"{module}.{part}", tensor, dtype)
    if tied and isinstance(model.lm_head, nn.Linear):
        model.lm_head.weight = model.get_parameter(EMBEDDING)
    use_products(model)
    return model.eval()


def _put(model: Any, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor.to(dtype), requires_grad=False)
    else:  # parts of packed weights keep their dtype
        module._buffers[leaf] = tensor


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What ``dtype: auto`` means: what the configuration says, else how the embedding or the final norm is stored."""
    for key in ("dtype", "torch_dtype"):
        said = getattr(torch, str(checkpoint.config.get(key)).removeprefix("torch."), None)
        if isinstance(said, torch.dtype) and said.is_floating_point:
            return said
    infos = checkpoint.source.infos
    info = infos.get(EMBEDDING) or infos.get("model.norm.weight")
    found = torch.float32 if info is None else DTYPES[info.dtype]
    return found if found in (torch.bfloat16, torch.float16) else torch.float32


def insert_packed(model: Any, modules: Mapping[str, StoredModule], dtype: torch.dtype) -> None:
    """Put packed modules, without memory, in the places of ``modules``. Raises ``UserError``."""
    for name, stored in modules.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise UserError(f"the artifact names a module {name!r} that the model does not have") from None
        replacement: PackedWeight
        with torch.device("meta"):
            if isinstance(module, nn.Embedding):
                shape = (module.num_embeddings, module.embedding_dim)
                replacement = QuantizedEmbedding(stored.scheme, shape, dtype)
            elif isinstance(module, nn.Linear):
                shape = (module.out_features, module.in_features)
                biased = module.bias is not None
                inputs = stored.activations, stored.rotated, stored.input_group
                replacement = QuantizedLinear(stored.scheme, shape, biased, dtype, *inputs)
            else:
                raise UserError(f"the artifact quantizes {name!r}, which is neither a linear nor an embedding")
        model.set_submodule(name, replacement)
    embedding = model.get_input_embeddings()
    if isinstance(embedding, QuantizedEmbedding) and model.config.tie_word_embeddings:
        model.set_output_embeddings(TiedHead(embedding))
        model._tied_weights_keys = {}
        model.all_tied_weights_keys = {}

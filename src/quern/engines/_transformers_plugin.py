"""quern as a quantization method of transformers: ``AutoModelForCausalLM.from_pretrained(artifact)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quern.core.artifact import METHOD, module_schemes
from quern.core.errors import UserError
from quern.core.recipe import parse_recipe
from quern.engines._modules import QuantizedEmbedding, QuantizedLinear, TiedHead

_registered = False


class QuernConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of an artifact, kept as it is."""

    def __init__(self, **values: Any) -> None:
        self.quant_method = METHOD
        values.pop("quant_method", None)
        self.values = values

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, **self.values}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config


class QuernQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts packed modules where config.json says there are some; weights then load by name."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config.to_dict()
        recipe = parse_recipe(config.get("recipe"), "of the artifact")
        dtype = model.dtype
        for name, scheme in module_schemes(config).items():
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise UserError(f"the artifact names a module {name!r} that the model does not have") from None
            replacement: nn.Module
            with torch.device("meta"):
                if isinstance(module, nn.Embedding):
                    replacement = QuantizedEmbedding(scheme, (module.num_embeddings, module.embedding_dim), dtype)
                elif isinstance(module, nn.Linear):
                    in_block = ".layers." in name
                    mode = recipe.activations.mode if in_block else "none"
                    shape = (module.out_features, module.in_features)
                    replacement = QuantizedLinear(
                        scheme, shape, module.bias is not None, dtype, mode, in_block and recipe.rotated
                    )
                else:
                    raise UserError(f"the artifact quantizes {name!r}, which is neither a linear nor an embedding")
            model.set_submodule(name, replacement)
        embedding = model.get_input_embeddings()
        if isinstance(embedding, QuantizedEmbedding) and model.config.tie_word_embeddings:
            model.set_output_embeddings(TiedHead(embedding))
            model._tied_weights_keys = {}
            model.all_tied_weights_keys = {}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Tell transformers once."""
    global _registered
    if not _registered:
        _registered = True
        register_quantization_config(METHOD)(QuernConfig)
        register_quantizer(METHOD)(QuernQuantizer)

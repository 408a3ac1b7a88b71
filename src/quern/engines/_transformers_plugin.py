"""quern as a quantization method of transformers: ``AutoModelForCausalLM.from_pretrained(artifact)``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quern.architectures.base import architecture_of
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.folder import FolderSource
from quern.checkpoint.head import with_true_head
from quern.checkpoint.safetensors_file import TensorInfo, read_header
from quern.core.errors import UserError
from quern.engines._build import insert_packed
from quern.formats.quern import CODED_VERSION, METHOD, OWN_READER, QuernReader
from quern.loading.fitting import fitted

_registered = False


def _check_fit(model: Any, quantization: dict[str, Any], files: list[Path]) -> None:
    """Hold an artifact to the tensors that it must have, as quern's own commands do. Raises ``UserError``."""
    infos: dict[str, TensorInfo] = {}
    places: dict[str, Path] = {}
    for file in files:
        for name, info in read_header(file).items():
            infos[name], places[name] = info, file
    config = {**model.config.to_dict(), "quantization_config": quantization}
    fitted(with_true_head(Checkpoint(files[0].parent, config, FolderSource(infos, places))))


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
        if config.get("format_version") == CODED_VERSION:
            raise UserError(f"transformers {OWN_READER}. Load the artifact with quern, or quantize again without them")
        architecture = architecture_of(model.config.to_dict())
        architecture.adapt(model)
        insert_packed(model, QuernReader(config, architecture).plan(), model.dtype)
        if files := kwargs.get("checkpoint_files"):
            _check_fit(model, config, [Path(file) for file in files])

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *others: Any) -> list[Any]:
        """None that makes one tensor of several: the artifact has one for each parameter."""
        return [conversion for conversion in weight_conversions if not isinstance(conversion, WeightConverter)]

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

"""quern as a quantization method of vLLM: ``vllm serve ARTIFACT``, for artifacts of format quern.

Weights are decoded once, after loading: they take the memory and the time of unquantized ones, and what is served is what
was measured. Rotations of inputs are folded into the weights. Codecs' parts are collected one by one while vLLM loads,
because those of linears that it joins (tiles of a trellis, say) cannot be joined before they are decoded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from quern.codecs.base import codec_of
from quern.core.errors import UserError
from quern.formats.base import StoredModule
from quern.formats.quern import CODED_VERSION, INPUT_SCALE, INPUT_SIGNS, METHOD, OWN_READER, QuernReader
from quern.rotation.rotation import rotate_back

FIRST_VERSION = 3
"""Of the format; earlier ones say in their recipe what must be known here."""
WEIGHT = "weight"
_SHARDS = {"q": 0, "k": 1, "v": 2, None: 0}
_logger = init_logger(f"vllm.{__name__}")
_registered = False


class QuernConfig(QuantizationConfig):  # type: ignore[misc]
    """``quantization_config`` of an artifact."""

    def __init__(self, quantization: dict[str, Any]) -> None:
        super().__init__()
        version = quantization.get("format_version")
        if version == CODED_VERSION:
            raise UserError(f"vllm {OWN_READER}. Quantize again without storage: entropy")
        if not isinstance(version, int) or version < FIRST_VERSION:
            raise UserError(f"vllm loads quern artifacts from format version {FIRST_VERSION} on, not {version!r}")
        self.modules = QuernReader(quantization, cast(Any, None)).plan()
        if any(stored.activations != "none" for stored in self.modules.values()):
            _logger.warning("the artifact's int8 activations are quern's own engine's; inputs stay as they are here")

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuernConfig:
        return cls(config)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        owner, _, name = prefix.rpartition(".")
        joined = self.packed_modules_mapping.get(name, [name])
        stored = [self.modules.get(f"{owner}.{one}" if owner else one) for one in joined]
        linear = isinstance(layer, LinearBase)
        if not any(stored) or not (linear or isinstance(layer, VocabParallelEmbedding)):
            return UnquantizedLinearMethod() if linear else None
        return QuernMethod(stored, UnquantizedLinearMethod() if linear else UnquantizedEmbeddingMethod())


class QuernMethod(QuantizeMethodBase):  # type: ignore[misc]
    """Of a linear, of several that vLLM joined, or of an embedding. ``plain`` runs what was decoded."""

    def __init__(self, stored: list[StoredModule | None], plain: Any) -> None:
        self.stored, self.plain = stored, plain

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        if (input_size_per_partition, sum(output_partition_sizes)) != (input_size, output_size):
            raise UserError("quern's artifacts are served by one process each: set tensor_parallel_size to 1")
        rows = [getattr(layer, "org_vocab_size", output_size)] if len(self.stored) == 1 else output_partition_sizes
        self._shapes = [(count, input_size) for count in rows]
        self._rows, self._dtype = output_size, params_dtype
        self._pieces: list[dict[str, Tensor]] = [{} for _ in self.stored]
        wanted = [self._names(stored, shape) for stored, shape in zip(self.stored, self._shapes, strict=True)]
        self._wanted, self._placeholders = wanted, sorted({WEIGHT}.union(*wanted))
        for name in self._placeholders:
            parameter = nn.Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = self._collector(name)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    @staticmethod
    def _names(stored: StoredModule | None, shape: tuple[int, int]) -> list[str]:
        if stored is None:
            return [WEIGHT]
        names = list(codec_of(stored.scheme).part_shapes(shape))
        return names + [INPUT_SIGNS] * stored.rotated + [INPUT_SCALE] * (stored.activations == "static")

    def _collector(self, name: str) -> Any:
        def collect(parameter: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
            self._pieces[_SHARDS.get(shard, shard)][name] = loaded.clone()

        return collect

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        for pieces, wanted in zip(self._pieces, self._wanted, strict=True):
            if missing := [name for name in wanted if name not in pieces]:
                raise UserError(f"the artifact lacks {missing[0]!r} of a linear; get its files again")
        device = layer.get_parameter(WEIGHT).device
        whole = torch.zeros(self._rows, self._shapes[0][1], dtype=self._dtype, device=device)
        first = 0
        with _float32():
            for stored, shape, pieces in zip(self.stored, self._shapes, self._pieces, strict=True):
                whole[first : first + shape[0]] = _decoded(stored, shape, pieces).to(self._dtype)
                first += shape[0]
                pieces.clear()
        for name in self._placeholders:
            if name != WEIGHT:
                delattr(layer, name)
        layer.get_parameter(WEIGHT).data = whole  # the same parameter, which a tied head has too
        self.plain.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Any:
        return self.plain.apply(layer, x, bias)

    def embedding(self, layer: nn.Module, ids: Tensor) -> Any:
        return self.plain.embedding(layer, ids)


def _decoded(stored: StoredModule | None, shape: tuple[int, int], pieces: dict[str, Tensor]) -> Tensor:
    """The weight that inputs as they are get, ``(rows, columns)``."""
    if stored is None:
        return pieces[WEIGHT]
    codec = codec_of(stored.scheme)
    values = codec.decode(shape, {name: pieces[name] for name in codec.part_shapes(shape)})
    return rotate_back(values, pieces[INPUT_SIGNS]) if stored.rotated else values


@contextlib.contextmanager
def _float32() -> Iterator[None]:
    """vLLM loads with the model's dtype as the default one, in which codecs would compute."""
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(former)


def register() -> None:
    """Tell vLLM once."""
    global _registered
    if not _registered:
        _registered = True
        register_quantization_config(METHOD)(QuernConfig)

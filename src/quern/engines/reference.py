"""The reference engine: transformers' model classes on torch, packed weights unpacked as they are used.

Slow and plain: it judges every other engine. It runs unquantized folders and GGUF files, quern's artifacts and, where the
compressed-tensors package is installed, compressed-tensors artifacts (the only ones that transformers itself reads).
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quern.checkpoint.checkpoint import Checkpoint
from quern.codecs.base import CODECS
from quern.core.artifact import METHOD, quantization_of
from quern.core.engine import cache_argument, switch_length
from quern.core.errors import QuernError, UserError
from quern.core.parallel import thread_count
from quern.core.recipe import Recipe
from quern.engines._build import build, stored_dtype
from quern.engines._modules import PackedWeight, QuantizedEmbedding
from quern.engines._session import SequenceSession, check_batch
from quern.engines.base import ENGINES, DtypeName, Engine
from quern.loading.fitting import open_model


class ReferenceSequence:
    """One text with transformers' key/value cache.

    After each token the logits are those of the whole text in one pass. Where what is cached does not serve any more (a
    text that grew too long for its rotary frequencies, arithmetic that turned wider) all of it is computed again.
    """

    def __init__(self, model: ReferenceModel) -> None:
        self._model = model
        self._ids: list[int] = []
        self._cache, self._long = _empty_cache(), False
        self._open = True

    @property
    def length(self) -> int:
        """Tokens fed so far."""
        return len(self._ids)

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        assert 0 <= length <= len(self._ids)
        cached = self._cache.get_seq_length()
        if length < cached:
            self._cache.crop(length - cached)
        del self._ids[length:]

    def close(self) -> None:
        """Let the cache go."""
        self._ids, self._cache, self._open = [], None, False

    def check(self, tokens: int) -> None:
        """Raise ``UserError`` where it is closed, or ``tokens`` more do not fit."""
        if not self._open:
            raise UserError("the sequence is closed; open another one")
        length, limit = len(self._ids) + tokens, self._model.maximum_length
        if length > limit:
            raise UserError(f"{length} tokens do not fit: this model's context is {limit}. Shorten the prompt")

    def append(self, ids: list[int]) -> Tensor:
        """Float32 logits ``(vocabulary,)`` after ``ids``, which ``check`` let through."""
        whole = [*self._ids, *ids]
        if (long := self._model.counts_as_long(len(whole))) != self._long:
            self._cache, self._long = _empty_cache(), long
        logits = self._model.forward([whole[self._cache.get_seq_length() :]], self._cache)
        if self._model.overflowed(logits):
            self._model.widen()
            self._cache = _empty_cache()
            logits = self._model.forward([whole], self._cache)
        self._ids = whole
        return logits[0, -1]


def _empty_cache() -> Any:
    """A cache that keeps all positions of all layers, so that it can be cut back; masks see to sliding windows."""
    from transformers import DynamicCache

    return DynamicCache()


class ReferenceModel:
    """A loaded folder; see ``core.engine.BatchModel``, ``SwitchingModel`` and ``NotingModel``."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.vocabulary_size = int(model.config.vocab_size)
        self.maximum_length = int(model.config.max_position_embeddings)
        self.switch_length = switch_length(model.config)
        self.notes: list[str] = []
        self._cache_argument = cache_argument(model)

    def counts_as_long(self, length: int) -> bool:
        """Whether a text of ``length`` tokens goes by the rotary frequencies of long texts."""
        return self.switch_length is not None and length > self.switch_length

    def forward(self, ids: list[list[int]], cache: Any) -> Tensor:
        """Logits float32 ``(batch, 1, vocabulary)`` of the last position of ``ids``, which are added to ``cache``."""
        options = {self._cache_argument: cache, "use_cache": True, "logits_to_keep": 1, "return_dict": True}
        with torch.inference_mode():
            logits: Tensor = self.model(torch.tensor(ids), **options).logits.float()
        return logits

    def logits(self, ids: Tensor) -> Tensor:
        """Logits float32 ``(batch, time, vocabulary)`` for int64 ``(batch, time)``."""
        logits = self._logits(ids)
        if self.overflowed(logits):
            self.widen()
            logits = self._logits(ids)
        return logits

    def _logits(self, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.model(ids, use_cache=False).logits.float()
        return logits

    def overflowed(self, logits: Tensor) -> bool:
        """Whether ``logits`` are no numbers because float16, whose greatest is 65504, was too narrow for the model."""
        return self.model.dtype == torch.float16 and not bool(logits.isfinite().all())

    def widen(self) -> None:
        """Go on in float32."""
        self.model.float()
        for module in self.model.modules():
            if isinstance(module, QuantizedEmbedding):
                module.dtype = torch.float32
        self.notes.append("float16 arithmetic overflowed (its greatest number is 65504), so the model ran in float32")

    def open(self) -> ReferenceSequence:
        """A sequence without tokens. Its memory is taken as it grows."""
        return ReferenceSequence(self)

    def step(self, batch: Sequence[tuple[ReferenceSequence, list[int]]]) -> Tensor:
        """Append tokens to several sequences, one after the other; see ``core.engine.BatchModel``."""
        check_batch(batch)
        for sequence, tokens in batch:
            sequence.check(len(tokens))
        return torch.stack([sequence.append(tokens) for sequence, tokens in batch])

    def start(self) -> SequenceSession:
        """An empty session."""
        return SequenceSession(self)

    def bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads: everything but an untied embedding, of which it reads a row."""
        embedding = self.model.get_input_embeddings()
        total = sum(p.nbytes for p in self.model.parameters()) + sum(
            m.stored_bytes() for m in self.model.modules() if isinstance(m, PackedWeight)
        )
        if self.model.config.tie_word_embeddings:
            return int(total)
        whole = embedding.stored_bytes() if isinstance(embedding, QuantizedEmbedding) else embedding.weight.nbytes
        return int(total - whole + whole // self.vocabulary_size)


@ENGINES.add("reference")
class ReferenceEngine(Engine):
    """Runs whatever the registered codecs can decode."""

    def supports(self, recipe: Recipe | None) -> str | None:
        if recipe is None:
            return None
        unknown = {s.codec for s in (recipe.weights, recipe.embedding, recipe.head, *recipe.overrides) if s.quantized}
        unknown -= set(CODECS.names())
        return f"no codec called {', '.join(sorted(unknown))} is installed" if unknown else None

    def runs(self, checkpoint: Checkpoint) -> str | None:
        config = quantization_of(checkpoint.config) or {}
        return super().runs(checkpoint) if config.get("quant_method") == METHOD else None  # load() says what is missing

    def load(self, path: str | Path, *, dtype: DtypeName = "auto", threads: int | None = None) -> ReferenceModel:
        checkpoint = open_model(path)
        config = quantization_of(checkpoint.config) or {}
        method = config.get("quant_method")
        if method == "compressed-tensors" and importlib.util.find_spec("compressed_tensors") is None:
            raise UserError(
                f"{path} is a compressed-tensors artifact; install its reader: pip install 'quern[compressed-tensors]'"
            )
        if method not in (None, "quern", "compressed-tensors"):
            raise UserError(
                f"{path} is quantized by {method!r}; this engine runs quern and compressed-tensors artifacts"
            )
        if threads is not None:
            torch.set_num_threads(thread_count(threads))
        if method != "compressed-tensors":
            return ReferenceModel(build(checkpoint, stored_dtype(checkpoint) if dtype == "auto" else _dtype(dtype)))
        model = _from_pretrained(Path(checkpoint.path), dtype, _has_zero_points(config, checkpoint.path))
        _decompress(model, checkpoint.path)
        if config.get("transform_config"):
            _add_transforms(model, config["transform_config"], checkpoint.path)
        return ReferenceModel(model)


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def _has_zero_points(config: dict[str, Any], path: Path) -> bool:
    """Whether a compressed-tensors configuration stores packed zero points; ``UserError`` where it has several schemes."""
    groups = config.get("config_groups")
    known = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    weights = [group["weights"] for group in known if isinstance(group.get("weights"), dict)]
    found = any(not one.get("symmetric", True) for one in weights)
    if found and len(weights) > 1:  # transformers 5.24 decompresses all by the scheme of one
        raise UserError(
            f"{path} holds asymmetric weights beside weights of another scheme, which transformers does not decompress "
            "rightly. Quantize the checkpoint again with one scheme, or with symmetric ones"
        )
    return found


def _from_pretrained(folder: Path, dtype: DtypeName, decompress: bool) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    options: dict[str, Any] = {"dtype": "auto" if dtype == "auto" else _dtype(dtype)}
    if decompress:
        # compressed-tensors 0.20 allocates zero points unpacked, so that packed ones only load by its other path.
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the configuration above overrides the artifact's
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
            lost = sorted({*found["missing_keys"], *(entry[0] for entry in found["mismatched_keys"])})
            if lost:  # transformers would make them up
                raise UserError(
                    f"{folder} cannot be loaded: {lost[0]} (and {len(lost) - 1} more) is missing or has another shape. "
                    "Get its files again, or quantize the checkpoint again"
                )
            return model
    except QuernError:
        raise
    except Exception as error:  # transformers' classes raise many kinds for values that make no sense
        raise UserError(f"{folder} cannot be loaded: {error}") from error


def _decompress(model: Any, path: Path) -> None:
    """Run a token: compressed-tensors decompresses at the first one, and sees only then that a tensor has another shape."""
    try:
        with torch.inference_mode():
            model(torch.tensor([[0]]), use_cache=False)
    except Exception as error:  # whatever torch says of shapes that do not fit
        raise UserError(f"{path} cannot be run: {error}. Get its files again, or quantize again") from error


def _add_transforms(model: Any, config: Any, path: Path) -> None:
    """The transforms of activations in a compressed-tensors configuration; transformers 5.23 reads none of it."""
    from compressed_tensors.transform import TransformConfig, TransformFactory

    try:
        schemes = TransformConfig.model_validate(config).config_groups
        for name, scheme in schemes.items():
            scheme.apply = [place for place in scheme.apply if place.is_online()]  # the others are in the weights
            if scheme.apply and (scheme.type != "hadamard" or scheme.randomize):
                kind = f"{scheme.type}, randomize: {scheme.randomize}"
                raise UserError(
                    f"{path} wants inputs transformed ({kind}); this engine knows type hadamard, not randomized"
                )
            TransformFactory.from_scheme(scheme, name=name).apply_to_model(model, use_tqdm=False)
    except QuernError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{path} has an unusable transform_config: {error}") from None


def load(path: str | Path, *, dtype: DtypeName = "auto", threads: int | None = None) -> ReferenceModel:
    """Load a folder with the reference engine. Raises ``UserError`` for one that it cannot run."""
    return ReferenceEngine().load(path, dtype=dtype, threads=threads)

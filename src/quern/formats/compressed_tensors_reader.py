"""Reading compressed-tensors artifacts, other tools' among them: what they hold, and a model by transformers' own loader."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from quern.checkpoint.checkpoint import Checkpoint
from quern.core.errors import BadFileError, QuernError, UserError
from quern.formats.base import ArtifactReader, StoredModule, StoredWeight
from quern.formats.fit import misfit, plain, surplus

METHOD = "compressed-tensors"
_PARTS = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale",
    "input_scale", "input_zero_point", "input_global_scale", "output_scale",
)  # fmt: skip
_SMALL_PARTS = ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale")


class CompressedTensorsReader(ArtifactReader):
    """What the package itself checks (shapes of parts) is left to it."""

    through_transformers = True

    def plan(self) -> dict[str, StoredModule]:
        return {}

    def problems(self, checkpoint: Checkpoint) -> list[str]:
        """A weight is stored as it is, or as parts."""
        infos = checkpoint.source.infos
        wanted = plain(self.architecture.expected_shapes())
        modules = {name.removesuffix(".weight") for name in wanted if name.endswith(".weight")}
        parts = {f"{module}.{part}": module for module in modules for part in _PARTS}
        packed = {parts[name] for name in infos if name in parts}
        problems = surplus(set(infos) - set(wanted) - set(parts), self.architecture, infos)
        for name, what in sorted(wanted.items()):
            if name.removesuffix(".weight") in packed and name.endswith(".weight"):
                continue
            problems += misfit(name, infos[name], what) if name in infos else [f"tensor {name!r} is missing"]
        return problems

    def describe(self, checkpoint: Checkpoint) -> Iterator[tuple[str, StoredWeight]]:
        try:
            yield from self._describe(checkpoint)
        except QuernError:
            raise
        except (TypeError, ValueError, AttributeError, re.error) as error:  # of values that are not what they should be
            raise _unusable(checkpoint, f"the quantization_config is damaged: {error}") from None

    def _describe(self, checkpoint: Checkpoint) -> Iterator[tuple[str, StoredWeight]]:
        groups = self._groups(checkpoint)
        infos = checkpoint.source.infos
        for scale in checkpoint.names():
            if not scale.endswith(".weight_scale"):
                continue
            module = scale.removesuffix(".weight_scale")
            arguments = _group_of(checkpoint, groups, module)
            values = f"{module}.weight_packed" if f"{module}.weight_packed" in infos else f"{module}.weight"
            if f"{module}.weight_shape" in infos:
                shape = tuple(int(size) for size in checkpoint.read(f"{module}.weight_shape").reshape(-1).tolist())
            else:
                shape = checkpoint.info(values).shape
                if checkpoint.info(values).dtype == "U8":  # two FP4 codes a byte
                    shape = (*shape[:-1], 2 * shape[-1])
            small = [f"{module}.{part}" for part in _SMALL_PARTS if f"{module}.{part}" in infos]
            codec = "integer" if arguments.get("type", "int") == "int" else str(arguments["type"])
            strategy, group_size = str(arguments.get("strategy")), arguments.get("group_size")
            granularity = f"group {group_size}" if strategy == "group" else strategy
            yield (
                module,
                StoredWeight(shape, codec, granularity, int(arguments.get("num_bits", 8)), (values, *small)),
            )

    def _groups(self, checkpoint: Checkpoint) -> list[Any]:
        value = self.quantization.get("config_groups")
        if not isinstance(value, dict) or not all(isinstance(item, dict) for item in value.values()):
            raise _unusable(checkpoint, "the quantization_config has no usable 'config_groups'")
        return list(value.values())

    def load_model(self, checkpoint: Checkpoint, dtype: Any) -> Any:
        if importlib.util.find_spec("compressed_tensors") is None:
            raise UserError(
                f"{checkpoint.path} is a compressed-tensors artifact; install its reader: "
                "pip install 'quern[compressed-tensors]'"
            )
        model = _from_pretrained(Path(checkpoint.path), dtype, self._has_zero_points(checkpoint.path))
        _decompress(model, checkpoint.path)
        if transforms := self.quantization.get("transform_config"):
            _add_transforms(model, transforms, checkpoint.path)
        return model

    def _has_zero_points(self, path: Path) -> bool:
        """Whether there are packed zero points; ``UserError`` where there are several schemes."""
        groups = self.quantization.get("config_groups")
        known = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
        weights = [group["weights"] for group in known if isinstance(group.get("weights"), dict)]
        found = any(not one.get("symmetric", True) for one in weights)
        if found and len(weights) > 1:  # transformers 5.24 decompresses all by the scheme of one
            raise UserError(
                f"{path} holds asymmetric weights beside weights of another scheme, which transformers does not decompress "
                "rightly. Quantize the checkpoint again with one scheme, or with symmetric ones"
            )
        return found


def _group_of(checkpoint: Checkpoint, groups: list[Any], module: str) -> dict[str, Any]:
    """The weight arguments of the config group that ``module`` belongs to: by name, else by pattern, else by class."""
    ways: tuple[Callable[[str], bool], ...] = (
        lambda target: target == module,
        lambda target: target.startswith("re:") and re.match(target[3:], module) is not None,
        lambda target: target[:1].isupper(),
    )
    for fits in ways:
        for group in groups:
            if any(fits(target) for target in group.get("targets", [])) and isinstance(group.get("weights"), dict):
                arguments: dict[str, Any] = group["weights"]
                return arguments
    raise _unusable(checkpoint, f"no config group of the quantization_config covers module {module!r}")


def _unusable(checkpoint: Checkpoint, problem: str) -> BadFileError:
    return BadFileError(checkpoint.path / "config.json", problem, "Quantize the model again, or get its files again")


def _from_pretrained(folder: Path, dtype: Any, decompress: bool) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    options: dict[str, Any] = {"dtype": dtype}
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
    dtype = model.dtype
    try:
        try:
            _run_token(model)
        except RuntimeError:
            if all(parameter.dtype == dtype for parameter in model.parameters()):
                raise
            model.to(dtype)  # compressed-tensors 0.20 decompresses FP4 in bfloat16, whatever the model's dtype
            _run_token(model)
    except Exception as error:  # whatever torch says of shapes that do not fit
        raise UserError(f"{path} cannot be run: {error}. Get its files again, or quantize again") from error


def _run_token(model: Any) -> None:
    with torch.no_grad():  # what is decompressed in inference mode could not be turned into another dtype
        model(torch.tensor([[0]]), use_cache=False)


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

"""compressed-tensors (vLLM's format): W4A16 and its like as ``pack-quantized``, W8A8 as ``int-quantized``.

Field names and layouts follow compressed-tensors 0.20. Its packed integers are quern's ``integer`` codes as they are: the
signed value plus 2^(bits-1), dense in 32-bit words along the row, zero points down the rows. Scales keep the recipe's
``scale_dtype``, or the wider one that a module got; vLLM turns them into the model's own dtype when it loads.

A Hadamard rotation of inputs becomes a ``transform_config`` of type ``hadamard`` (Sylvester's matrix, as ours), a scheme for
each block size. Random signs have no place in it: type ``random-hadamard`` stores one dense matrix for all linears of a
width, where each of our groups has signs of its own, and its readers multiply by that matrix instead of n log n additions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from quern.codecs._bits import pack
from quern.core.errors import UserError, option
from quern.core.packed import QuantizedWeight
from quern.core.readers import obstacles_of
from quern.core.recipe import Recipe, WeightScheme
from quern.formats.base import FORMATS, Format
from quern.rotation.rotation import block_size

METHOD = "compressed-tensors"
_QUERN = option("format='quern'", "--format quern")
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that vLLM joins into one when it loads; they must share a scheme."""


@FORMATS.add("compressed-tensors")
class CompressedTensors(Format):
    """Integer weights of 2 to 8 bits per channel or group; int8 activations per token or tensor."""

    extra = "compressed-tensors"

    def check(self, schemes: dict[str, WeightScheme], shapes: dict[str, tuple[int, ...]]) -> None:
        problems: dict[str, list[str]] = {}
        if self.recipe.random_signs:
            problems["its Hadamard rotation has no random signs; set random_signs: false in transform hadamard"] = []
        for module, scheme in schemes.items():
            for problem in _problems(module, scheme, shapes[module], self.recipe):
                problems.setdefault(problem, []).append(module)
        for problem in _torn(schemes):
            problems[problem] = []
        linears = {module: scheme for module, scheme in schemes.items() if not module.endswith("embed_tokens")}
        if len(self._alike(linears)) > 1 and not all(scheme.symmetric for scheme in linears.values()):
            problems["asymmetric weights need one scheme for all, because transformers decompresses all by one"] = []
        if problems:
            raise UserError(
                f"format compressed-tensors cannot store recipe {self.recipe.name!r}:\n"
                + "\n".join(f"  {problem}{_examples(modules)}" for problem, modules in problems.items())
                + f"\nChange the recipe, or use {_QUERN}"
            )

    def encode(
        self, module: str, weight: QuantizedWeight, input_scale: float | None, input_signs: Tensor | None = None
    ) -> dict[str, Tensor]:
        assert input_signs is None or not bool(input_signs.any())  # check() refuses random signs
        scheme, parts = weight.scheme, weight.parts
        tensors = {"weight_scale": parts["scale"]}
        if scheme.granularity == "tensor":
            tensors["weight_scale"] = parts["scale"].reshape(1)
        if _activation_mode(module, self.recipe) != "none":
            tensors["weight"] = parts["codes"]
        else:
            tensors["weight_packed"] = _packed(scheme, parts["codes"])
            tensors["weight_shape"] = torch.tensor(weight.shape, dtype=torch.int64)
        if not scheme.symmetric:
            tensors["weight_zero_point"] = parts["zero_point"]
        if input_scale is not None:
            tensors["input_scale"] = torch.tensor([input_scale], dtype=torch.float32)
        return {f"{module}.{name}": tensor for name, tensor in tensors.items()}

    def parts(
        self, module: str, scheme: WeightScheme, shape: tuple[int, int], tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        raise UserError(f"format compressed-tensors stores no quantized embedding, and {module} is one")

    def quantization_config(
        self, schemes: dict[str, WeightScheme], unquantized: Sequence[str], shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, Any]:
        unsaid = not all(scheme.symmetric for scheme in schemes.values()) and len(_scale_dtypes(schemes)) > 1
        if unsaid:  # transformers decompresses asymmetric weights by one scheme for all, with scales as they are stored
            schemes = {name: scheme.model_copy(update={"scale_dtype": "float32"}) for name, scheme in schemes.items()}
        alike = self._alike(schemes)
        groups, formats = {}, set()
        for position, ((scheme, mode), modules) in enumerate(alike.items()):
            name = "pack-quantized" if mode == "none" else "int-quantized"
            formats.add(name)
            groups[f"group_{position}"] = {
                "targets": modules,
                "weights": _arguments(scheme) | ({"scale_dtype": None} if unsaid else {}),
                "input_activations": _activations(mode),
                "output_activations": None,
                "format": name,
            }
        config = {
            "quant_method": METHOD,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted(unquantized),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
        if self.recipe.rotated:
            widths = {module: shapes[module][1] for module in sorted(schemes) if _in_block(module)}
            config["transform_config"] = {"config_groups": _rotations(widths)}
        return config

    def _alike(self, schemes: dict[str, WeightScheme]) -> dict[tuple[WeightScheme, str], list[str]]:
        """The modules of each scheme and mode of activations: the groups of the configuration."""
        alike: dict[tuple[WeightScheme, str], list[str]] = {}
        for module, scheme in sorted(schemes.items()):
            alike.setdefault((scheme, _activation_mode(module, self.recipe)), []).append(module)
        return alike

    def notes(self, biased: Sequence[str]) -> list[str]:
        found = [f"{obstacle.target} {obstacle.reason}" for obstacle in obstacles_of(self.recipe)]
        if self.recipe.rotated and (rotated := [module for module in biased if _in_block(module)]):
            names = sorted({module.rpartition(".")[2] for module in rotated})
            found.append(
                f"vllm refuses this artifact: it rotates no inputs of linears with a bias, and {', '.join(names)} of this "
                "model have one; leave the rotation away, or keep them out of it by overrides of codec none"
            )
        return found


def _activation_mode(module: str, recipe: Recipe) -> str:
    """What the inputs of ``module`` become: the recipe's choice inside the decoder blocks, nothing before the head."""
    return recipe.activations.mode if _in_block(module) else "none"


def _in_block(module: str) -> bool:
    return ".layers." in module


def _rotations(widths: dict[str, int]) -> dict[str, Any]:
    """The transform schemes that rotate the inputs of modules, which have so many columns.

    Weights are stored rotated, so there is only the part that runs: no ``weight_input``, which a loader would apply again.
    """
    alike: dict[int, list[str]] = {}
    for module, columns in widths.items():
        alike.setdefault(block_size(columns), []).append(module)
    return {
        f"rotation_{size}": {
            "type": "hadamard",
            "apply": [{"targets": modules, "location": "input", "inverse": False, "ignore": []}],
            "randomize": False,
            "requires_grad": False,
            "head_dim": size,
            "precision": "torch.float32",
        }
        for size, modules in sorted(alike.items())
        if size > 1  # a rotation of single columns changes nothing
    }


def _problems(module: str, scheme: WeightScheme, shape: tuple[int, ...], recipe: Recipe) -> Iterator[str]:
    """Everything about ``module`` that the format, or vLLM with it, cannot say."""
    if scheme.codec != "integer":
        yield f"it stores integers, not codec {scheme.codec!r}; set codec: integer"
    if module.endswith("embed_tokens"):
        yield "vLLM reads no quantized embedding; set embedding: {codec: none}"
        return
    if scheme.group_size is not None and shape[1] % scheme.group_size:
        yield f"the rows have {shape[1]} inputs, which is not a multiple of the group size {scheme.group_size}"
    if scheme.bits < 2:
        yield "1-bit integers are not part of it"
    if _activation_mode(module, recipe) == "none" and scheme.granularity == "tensor":
        yield "weight-only quantization per tensor is not part of it; use granularity channel or group"


def _torn(schemes: dict[str, WeightScheme]) -> list[str]:
    """Linears that vLLM joins into one matrix and that have several schemes."""
    found: dict[str, None] = {}
    for fused in FUSED:
        for module in schemes:
            stem, _, last = module.rpartition(".")
            if last in fused and any(schemes.get(f"{stem}.{name}") != schemes[module] for name in fused):
                found[f"{', '.join(fused)} of {stem}"] = None
    return [
        f"{names} need one scheme, because vLLM joins them into one matrix; change the overrides" for names in found
    ]


def _examples(modules: Sequence[str]) -> str:
    """One module's name and how many more there are; nothing where a line names its modules itself."""
    if not modules:
        return ""
    more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
    return f" ({modules[0]}{more})"


def _scale_dtypes(schemes: dict[str, WeightScheme]) -> set[str]:
    return {scheme.scale_dtype for scheme in schemes.values()}


def _packed(scheme: WeightScheme, codes: Tensor) -> Tensor:
    if codes.dtype == torch.int8:  # quern keeps symmetric 8-bit codes as signed bytes
        return pack((codes.to(torch.int16) + 128).to(torch.uint8), 8)
    return codes


def _arguments(scheme: WeightScheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": scheme.granularity,
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
        "scale_dtype": f"torch.{scheme.scale_dtype}",
        "zp_dtype": None if scheme.symmetric else "torch.int8",
    }


def _activations(mode: str) -> dict[str, Any] | None:
    if mode == "none":
        return None
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token" if mode == "dynamic" else "tensor",
        "group_size": None,
        "dynamic": mode == "dynamic",
        "actorder": None,
        "block_structure": None,
        "observer": None if mode == "dynamic" else "minmax",
        "observer_kwargs": {},
    }

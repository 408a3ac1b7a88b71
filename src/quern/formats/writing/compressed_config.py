"""What compressed-tensors 0.20 says in config.json of integers, of activations and of rotations."""

from __future__ import annotations

from typing import Any

from quern.codecs.base import ScaledParameters
from quern.rotation.rotation import block_size


def integer_arguments(params: ScaledParameters) -> dict[str, Any]:
    """The weights' entry of a config group."""
    return {
        "num_bits": params.bits,
        "type": "int",
        "symmetric": params.symmetric,
        "strategy": params.granularity,
        "group_size": params.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
        "scale_dtype": f"torch.{params.scale_dtype}",
        "zp_dtype": None if params.symmetric else "torch.int8",
    }


def activation_arguments(mode: str) -> dict[str, Any] | None:
    """The inputs' entry of a config group; ``mode``: an ``ActivationMode``."""
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


def rotations(widths: dict[str, int]) -> dict[str, Any]:
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

"""Checkpoints whose weights lie on no disk: each is drawn from a seed when it is read.

A folder with ``config.json`` and ``synthetic.json`` is read as any checkpoint is; of a 72B that is 300 kB instead of 145 GB.
``tools/make_synthetic_checkpoint.py`` makes such folders. ``synthetic.json``::

    {"version": 1, "seed": 0, "tensors": {NAME: {"dtype": "BF16", "shape": [8192, 8192], "scale": 0.011,
     "mean": 0.0, "distribution": "student4", "rows": [[17, 8.0]], "columns": [], "set": [[3, 5, 40.0]]}}}

A tensor is ``mean`` + ``scale`` times numbers of unit variance, times the factors of its ``rows`` and ``columns``; then the
numbers of ``set`` (row, column, value) are put in. ``rows`` of a vector are its entries. ``distribution``:

- ``normal``: of each of 2**16 equal shares of probability its middle quantile
- ``student4``: the same of Student's t with four degrees of freedom, whose tails are as heavy as those of trained weights
  (its quantiles in closed form: Shaw 2006, Sampling Student's T distribution, J. Computational Finance 9, equation 40)
- ``constant``: no numbers, the mean alone

Which quantile is said by 16 bits of the counter-based generator Philox 4x64-10 (Salmon et al. 2011, Parallel random numbers:
as easy as 1, 2, 3), keyed by the seed and the name of the tensor, which depends on nothing else and is the same everywhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from quern.checkpoint.files import read_json
from quern.checkpoint.safetensors_file import DTYPES, TensorInfo, allocate_bytes
from quern.core.errors import BadFileError
from quern.core.seeds import derive_seed

SYNTHETIC = "synthetic.json"
VERSION = 1
_LIMIT = 100_000_000
_LEVELS = 1 << 16
_AT_ONCE = 1 << 22
"""Numbers that are drawn before they are put in their place; a multiple of the 16 of one step of the generator."""
_AGAIN = "Make the folder again with tools/make_synthetic_checkpoint.py"
Count = Annotated[int, Field(ge=1, le=2**40)]
Place = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class DrawnTensor(BaseModel):
    """How one tensor is drawn; see the module."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    dtype: Literal["BF16", "F16", "F32"] = "BF16"
    shape: tuple[Count] | tuple[Count, Count] | tuple[Count, Count, Count]
    distribution: Literal["normal", "student4", "constant"] = "student4"
    mean: Number = 0.0
    scale: Number = 1.0
    rows: tuple[tuple[Place, Number], ...] = ()
    columns: tuple[tuple[Place, Number], ...] = ()
    set: tuple[tuple[Place, Place, Number], ...] = ()


class Description(BaseModel):
    """The content of ``synthetic.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Literal[1]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    tensors: dict[str, DrawnTensor]


@dataclass(frozen=True)
class SyntheticSource:
    """The tensors of a folder with ``synthetic.json``."""

    path: Path
    description: Description

    @functools.cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor; in no file, so each begins and ends at 0."""
        tensors = self.description.tensors
        return {name: TensorInfo(tensor.dtype, tensor.shape, 0, 0) for name, tensor in tensors.items()}

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """What the weights depend on."""
        return (self.path,)

    def place(self, name: str) -> Path:
        """The description."""
        return self.path

    def plain(self, name: str) -> bool:
        """Never: no file holds the numbers."""
        return False

    def read(self, name: str) -> Tensor:
        """One tensor in fresh memory on the CPU. Raises ``UserError`` where memory does not suffice."""
        drawn = self.description.tensors[name]
        dtype = DTYPES[drawn.dtype]
        result = allocate_bytes(self.path, math.prod(drawn.shape) * dtype.itemsize).view(dtype)
        draw(drawn, derive_seed(self.description.seed, "synthetic", name), result)
        result = result.view(drawn.shape)
        for row, factor in drawn.rows:
            result[row] *= factor
        for column, factor in drawn.columns:
            result[..., column] *= factor
        for row, column, value in drawn.set:
            result[..., row, column] = value
        return result


def open_synthetic(folder: Path) -> SyntheticSource:
    """The tensors that ``synthetic.json`` of a folder describes. Raises ``BadFileError``."""
    path = folder / SYNTHETIC
    content = read_json(path, _LIMIT)
    if content.get("version") != VERSION:
        came = repr(content.get("version"))[:40]
        raise BadFileError(path, f"is of version {came}; version {VERSION} is read", _AGAIN)
    try:
        description = Description.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadFileError(path, f"has at {'.'.join(map(str, first['loc']))[:200]}: {first['msg']}", _AGAIN) from None
    for name, tensor in description.tensors.items():
        if problem := _misplaced(tensor):
            raise BadFileError(path, f"tensor {name[:200]!r} of shape {tensor.shape} {problem}", _AGAIN)
    return SyntheticSource(path, description)


def _misplaced(tensor: DrawnTensor) -> str | None:
    """What names a row or column that the tensor has not."""
    rows = tensor.shape[0] if len(tensor.shape) < 3 else tensor.shape[1]
    if math.prod(tensor.shape) > 2**48:
        return "has more than 2**48 numbers"
    if len(tensor.shape) == 1 and (tensor.columns or tensor.set):
        return "is a vector, which has rows only"
    if any(row >= tensor.shape[0] for row, _ in tensor.rows):
        return "has not all of its rows"
    if any(column >= tensor.shape[-1] for column, _ in tensor.columns):
        return "has not all of its columns"
    if any(row >= rows or column >= tensor.shape[-1] for row, column, _ in tensor.set):
        return "has not all places that are set"
    return None


def draw(drawn: DrawnTensor, key: int, result: Tensor) -> None:
    """Fill ``result``, of one dimension, without factors and without what is set."""
    if drawn.distribution == "constant":
        result.fill_(drawn.mean)
        return
    levels = torch.from_numpy(drawn.mean + drawn.scale * _quantiles(drawn.distribution)).to(result.dtype)
    random = np.random.Philox(key=key)
    for piece in torch.split(result, _AT_ONCE):
        places = random.random_raw(-(-len(piece) // 4)).astype("<u8", copy=False).view("<u2")[: len(piece)]
        torch.index_select(levels, 0, torch.from_numpy(places.astype(np.int32)), out=piece)


@functools.cache
def _quantiles(distribution: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of unit variance: the middle quantiles of 2**16 equal shares, ascending."""
    shares = (np.arange(_LEVELS) + 0.5) / _LEVELS
    if distribution == "normal":
        inverse = NormalDist().inv_cdf
        return np.array([inverse(share) for share in shares])
    alpha = np.sqrt(4 * shares * (1 - shares))
    size = 2 * np.sqrt(np.cos(np.arccos(np.minimum(alpha, 1.0)) / 3) / alpha - 1)
    return np.asarray(np.sign(shares - 0.5) * size / math.sqrt(2), np.float64)

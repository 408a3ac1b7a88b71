"""Gradients at linears' outputs, for feedback among rows: where they are kept from one pass to the other.

The pass backwards that makes token weights has them all. Of blocks of which little is kept it adds them up on the way, for
the rounding of the block, and for other recipes of the same model and text. Of larger ones, and where transforms first
change what linears give, the inputs of blocks and the gradients of their outputs stay, from which they are computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from quern.architectures.base import BlockSpec
from quern.checkpoint.safetensors_file import read_tensors
from quern.core.errors import BadFileError
from quern.pipeline.blockwise.job import Job
from quern.quantization.calibration.drift import HELD_OUT
from quern.quantization.calibration.outputs import MOST_JUDGES, OutputStatistics, bytes_of
from quern.quantization.transforms.base import TRANSFORMS, ChannelScaling

OUTPUTS = "outputs"
AT_ONCE = 1 << 28
"""Bytes of what is kept of outputs up to which all of a block are looked at in one pass."""


def wanted(job: Job, block: BlockSpec) -> list[str]:
    """The linears of ``block`` whose rounding counts gradients at outputs, relative to it."""
    names = [linear.name for linear in block.linears]
    plans = {name: job.plan[block.prefix + name] for name in names}
    return [name for name, plan in plans.items() if plan.quantized and plan.rounding.two_sided]


def kept(job: Job, index: int) -> list[str]:
    """Those of block ``index`` that the pass backwards adds up; all that are wanted, or none in any block."""
    if not job.two_sided or any(
        issubclass(TRANSFORMS.get(one.method), ChannelScaling) for one in job.recipe.transforms
    ):
        return []
    blocks = job.architecture.blocks
    sizes = [sum(bytes_of(block.linear(name).shape[0]) for name in wanted(job, block)) for block in blocks]
    return wanted(job, blocks[index]) if max(sizes) <= AT_ONCE else []


def recomputes(job: Job) -> bool:
    """Whether they are computed again, block by block."""
    return job.two_sided and not any(kept(job, index) for index in range(job.architecture.layers))


class Sums:
    """Those of one block as the pass backwards meets them."""

    def __init__(self, linears: Mapping[str, int], device: torch.device) -> None:
        """``linears``: their rows by name."""
        self.by_linear = {name: OutputStatistics.of(rows, device) for name, rows in linears.items()}

    def add(self, job: Job, sequence: int, gradients: Sequence[Tensor]) -> None:
        """Of a calibration sequence: ``(tokens, rows)`` of each linear."""
        judge = sequence % HELD_OUT == HELD_OUT - 1
        for found, some in zip(self.by_linear.values(), gradients, strict=True):
            found.add(some, judge, job.workers)

    def write(self, job: Job, index: int) -> Path:
        """Of block ``index``, for ``read``."""
        tensors: dict[str, Tensor] = {}
        for name, found in self.by_linear.items():
            (hessian,) = found.hessians  # of more than one part nothing is kept
            rows = len(hessian)
            upper = torch.triu_indices(rows, rows)
            tensors[f"{name}.hessian"] = hessian[upper[0], upper[1]].cpu()
            judges = found.judges or [torch.empty(0, rows)]
            tensors[f"{name}.judges"] = torch.cat(judges).cpu()
        return job.work.write_tensors(_name(index), tensors)


def read(job: Job, index: int, linears: Mapping[str, int]) -> dict[str, OutputStatistics]:
    """What was written of block ``index``; ``linears``: their rows by name."""
    stored = job.work.read_tensors(_name(index))
    found = {}
    for name, rows in linears.items():
        upper = torch.triu_indices(rows, rows)
        hessian = torch.zeros(rows, rows)
        hessian[upper[0], upper[1]] = stored[f"{name}.hessian"]
        judges = stored[f"{name}.judges"]
        found[name] = OutputStatistics([hessian.to(job.device)], [judges.to(job.device)] if len(judges) else [])
    return found


def forget(job: Job, index: int) -> None:
    """Remove what was kept of block ``index``."""
    job.work.path(f"{_name(index)}.safetensors").unlink(missing_ok=True)


def shared_folder(token_weights: Path, job: Job) -> Path:
    """The folder beside the shared one of the token weights for the gradients of the same linears."""
    names = [kept(job, index) for index in range(job.architecture.layers)]
    depends = json.dumps([token_weights.name, names, HELD_OUT, MOST_JUDGES])
    return token_weights.with_name(f"output-gradients-{hashlib.sha256(depends.encode()).hexdigest()[:16]}")


def take_over(job: Job, shared: Path) -> None:
    """Copy what lies in ``shared`` into the work folder. Raises ``BadFileError`` where that is of another model."""
    for index in range(job.architecture.layers):
        path, block = shared / f"{index:04d}.safetensors", job.architecture.block(index)
        tensors = read_tensors(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name in kept(job, index):
            rows = block.linear(name).shape[0]
            judges = shapes.get(f"{name}.judges", ())
            if shapes.get(f"{name}.hessian") != (rows * (rows + 1) // 2,) or judges[1:] != (rows,):
                raise BadFileError(path, "does not hold the gradients of this model", f"Remove {shared}")
        job.work.write_tensors(_name(index), tensors)


def _name(index: int) -> str:
    return f"{OUTPUTS}/{index:04d}"

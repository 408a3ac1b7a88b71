"""The sensitivity pass: Fisher token weights for every linear, streamed.

Forward through the unquantized blocks, keeping every block's inputs on disk; then backward, block by block from the last.
Leaves ``weights/<block>.safetensors`` with one number for each linear and token, and nothing else. They depend on the
model and the calibration tokens, not on what the recipe rounds to, so recipes that are tried on one model share them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quern.checkpoint.files import explain_write_errors, read_json, write_json
from quern.checkpoint.safetensors_file import read_tensors
from quern.core.errors import BadFileError
from quern.core.machine.heap import release_freed
from quern.core.progress import Task
from quern.pipeline.blockwise.job import Job
from quern.quantization.arithmetic import arithmetic
from quern.quantization.calibration.activations import ActivationFile
from quern.quantization.calibration.block import Block
from quern.quantization.calibration.drift import HELD_OUT
from quern.quantization.calibration.outputs import OutputStatistics
from quern.quantization.calibration.token_weights import (
    block_gradients,
    output_gradient,
    output_gradients,
    sequence_seed,
)

INPUTS, GRADIENTS, WEIGHTS, ROWS, SAMPLED = "inputs", "gradients", "weights", "rows", "sampled"
_TIMING = "timing.json"


def needed(job: Job) -> bool:
    """Whether the recipe's rounding or tuning reads Fisher token weights."""
    reads = job.uses_hessians or job.recipe.tuning is not None
    return job.recipe.calibration.token_weight == "fisher" and reads


def token_weights(job: Job, index: int) -> dict[str, Tensor]:
    """Squared gradients float32 ``(tokens,)`` of block ``index`` by linear, once ``run`` has ended."""
    return job.work.read_tensors(f"{WEIGHTS}/{index:04d}")


def row_squares(job: Job, index: int) -> dict[str, Tensor]:
    """Squared gradients float32 ``(rows,)`` summed over the tokens, of block ``index`` by linear, where they were kept."""
    return job.work.read_tensors(f"{ROWS}/{index:04d}")


def sampled_gradients(job: Job, index: int) -> dict[str, Tensor]:
    """dL/dy_ti bfloat16 ``(tokens, rows)`` of block ``index`` by linear, as the ``Sample`` said; in order."""
    return job.work.read_tensors(f"{SAMPLED}/{index:04d}")


def shared_folder(cache: Path, fingerprint: Mapping[str, Any], job: Job) -> Path:
    """The folder in ``cache`` for the token weights of all jobs with this one's model, calibration tokens and arithmetic."""
    assert job.sequences is not None
    depends = {key: fingerprint[key] for key in ("quern", "model_sha256", "seed", "device")} | arithmetic()
    depends["tokens"] = hashlib.sha256(job.sequences.numpy().tobytes()).hexdigest()
    depends["compute_dtype"] = str(job.compute_dtype)
    depends["holds"] = "squared gradients"
    return cache / f"token-weights-{hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Sample:
    """Gradients at the linears' outputs that are kept: of some rows, for the tokens of some sequences."""

    rows: Callable[[str, int], Tensor]
    """Of a linear, by its full name and number of rows: int64."""
    takes: Callable[[int], bool]
    """Whether a sequence is one of them."""


def run(job: Job, shared: Path | None = None, *, sample: Sample | None = None) -> float:
    """The whole pass; continues where an earlier run was stopped.

    With ``shared`` (a ``shared_folder``) what lies there is taken over, or the result is put there. A recipe that rounds by
    both sides needs more than that: for it the inputs of blocks and the gradients of their outputs stay, and ``forget``
    removes them. With ``sample``
    gradients are kept: those of the embedding's outputs, and what ``sampled_gradients`` and ``row_squares`` read. Returns
    the seconds that were spared: those that the pass took when it was made. Raises ``BadFileError`` for a damaged
    ``shared``.
    """
    layers = job.architecture.layers
    if all(job.work.done(f"weights {index}") is not None for index in range(layers)):
        return 0.0
    spared, whole, started = 0.0, job.work.done("inputs 0") is None, time.perf_counter()
    if shared is not None and shared.is_dir() and not job.two_sided:
        spared = _take_over(job, shared)
    else:
        _compute(job, sample)
        if shared is not None and whole:
            share(job, shared, time.perf_counter() - started)
    for index in range(layers + 1):
        if not job.two_sided or index == layers:
            job.activations(INPUTS, index).path.unlink(missing_ok=True)
    if sample is None:
        job.activations(GRADIENTS, 0).path.unlink(missing_ok=True)
    return spared


def output_statistics(job: Job, block: Block, linears: Sequence[str]) -> dict[str, OutputStatistics]:
    """Of the gradients at the outputs of some linears of ``block``, as it was before anything of it was rounded."""
    index = block.spec.index
    inputs, outer = job.activations(INPUTS, index), job.activations(GRADIENTS, index + 1)
    rows = {name: block.linear(name).out_features for name in linears}
    found = {name: OutputStatistics(torch.zeros(count, count, device=job.device)) for name, count in rows.items()}
    with block.recording(linears):
        for start, stop in inputs.waves():
            pairs = list(zip(inputs.read(start, stop), outer.read(start, stop), strict=True))
            results = job.workers.map(lambda pair: output_gradients(block, *pair), pairs)
            for place, gradients in enumerate(results, start=start):
                judge = place % HELD_OUT == HELD_OUT - 1
                for name, some in zip(linears, gradients, strict=True):
                    found[name].add(some, judge, job.workers)
    return found


def forget(job: Job, index: int) -> None:
    """Remove what ``output_statistics`` of block ``index`` reads."""
    for kind, place in ((INPUTS, index), (GRADIENTS, index + 1)):
        job.activations(kind, place).path.unlink(missing_ok=True)


def share(job: Job, shared: Path, seconds: float) -> None:
    """Leave the weights that ``run`` made, in ``seconds``, in the ``shared_folder`` for other jobs."""
    if not shared.is_dir():
        _put_into(shared, job, seconds)


def _take_over(job: Job, shared: Path) -> float:
    assert job.sequences is not None
    for index in range(job.architecture.layers):
        linears = [linear.name for linear in job.architecture.block(index).linears]
        path = shared / f"{index:04d}.safetensors"
        tensors = read_tensors(path)
        if [(name, tensors[name].numel()) for name in sorted(tensors)] != [
            (name, job.sequences.numel()) for name in sorted(linears)
        ]:
            raise BadFileError(path, "does not hold the token weights of this model", f"Remove {shared}")
        job.work.finish(f"weights {index}", [job.work.write_tensors(f"{WEIGHTS}/{index:04d}", tensors)], {})
    return float(read_json(shared / _TIMING)["seconds"])


def _put_into(shared: Path, job: Job, seconds: float) -> None:
    """Whole or not at all; what another process put there meanwhile stays."""
    unfinished = shared.with_name(f".{shared.name}.{os.getpid()}")
    with explain_write_errors(shared, 0):
        shutil.copytree(job.work.path(WEIGHTS), unfinished, dirs_exist_ok=True)
        write_json(unfinished / _TIMING, {"seconds": seconds})
        try:
            os.rename(unfinished, shared)
        except OSError:
            shutil.rmtree(unfinished)
            if not shared.is_dir():
                raise


def _compute(job: Job, sample: Sample | None = None) -> None:
    layers = job.architecture.layers
    task = job.progress.task("token weights", 2 * layers + 1, _behind(job))
    _forward(job, task)
    if not _has_output_gradients(job):
        _output_gradients(job)
        task.advance()
    for index in reversed(range(layers)):
        if job.work.done(f"weights {index}") is None:
            _backward(job, index, sample)
            release_freed()
            task.advance()
        # Only now: a run that is stopped in block ``index`` needs these gradients again.
        if not job.two_sided:
            job.activations(GRADIENTS, index + 1).path.unlink(missing_ok=True)
    task.done()


def _behind(job: Job) -> int:
    """Steps of ``_compute`` that an earlier run has done."""
    layers = job.architecture.layers
    steps = [*(f"inputs {index + 1}" for index in range(layers)), *(f"weights {index}" for index in range(layers))]
    return sum(job.work.done(step) is not None for step in steps) + _has_output_gradients(job)


def _forward(job: Job, task: Task) -> None:
    """Inputs of every block, and the outputs of the last, on disk."""
    assert job.sequences is not None
    sequences = job.sequences
    store = job.activations(INPUTS, 0)
    if job.work.done("inputs 0") is None:
        embedding = job.read(f"{job.architecture.embedding}.weight")
        store.write(lambda start, stop: embedding[sequences[start:stop]])
        del embedding
        job.work.finish("inputs 0", [store.path], {})
    for index in range(job.architecture.layers):
        source, following = job.activations(INPUTS, index), job.activations(INPUTS, index + 1)
        if job.work.done(f"inputs {index + 1}") is None:
            block = _block(job, index)
            following.write(partial(_run_wave, job, block, source))
            job.work.finish(f"inputs {index + 1}", [following.path], {})
            release_freed()
            task.advance()


def _run_wave(job: Job, block: Block, source: ActivationFile, start: int, stop: int) -> Tensor:
    return block.run_each(source.read(start, stop), job.workers)


def _backward(job: Job, index: int, sample: Sample | None) -> None:
    """Token weights of block ``index``, and the gradient of its inputs."""
    block = _block(job, index)
    inputs, outer = job.activations(INPUTS, index), job.activations(GRADIENTS, index + 1)
    inner = job.activations(GRADIENTS, index)
    linears = [linear.name for linear in block.spec.linears]
    collected: list[Tensor] = []
    sums = {linear.name: torch.zeros(linear.shape[0], device=job.device) for linear in block.spec.linears}
    kept: dict[str, list[Tensor]] = {name: [] for name in linears}
    rows = [] if sample is None else [sample.rows(block.spec.prefix + n, len(total)) for n, total in sums.items()]

    def wave(start: int, stop: int) -> Tensor:
        taken = [rows if sample is not None and sample.takes(place) else [] for place in range(start, stop)]
        triples = list(zip(inputs.read(start, stop), outer.read(start, stop), taken, strict=True))
        results = job.workers.map(lambda triple: block_gradients(block, *triple), triples)
        for result in results:
            collected.append(result.squares)
            for name, total in zip(linears, result.rows, strict=True):
                sums[name] += total
            for name, some in zip(linears, result.sampled, strict=False):
                kept[name].append(some.to(torch.bfloat16).cpu())
        return torch.stack([result.inputs for result in results])

    with block.recording(linears):
        inner.write(wave)
    squares = torch.cat(collected, dim=1)
    path = job.work.write_tensors(f"{WEIGHTS}/{index:04d}", dict(zip(linears, squares, strict=True)))
    job.work.finish(f"gradients {index}", [inner.path], {})
    if sample is not None:
        written = [
            job.work.write_tensors(f"{ROWS}/{index:04d}", sums),
            job.work.write_tensors(f"{SAMPLED}/{index:04d}", {name: torch.cat(parts) for name, parts in kept.items()}),
        ]
        job.work.finish(f"{ROWS} {index}", written, {})
    job.work.finish(f"weights {index}", [path], {})


def _block(job: Job, index: int) -> Block:
    assert job.sequences is not None
    return Block(job.architecture, index, job.read, job.compute_dtype, job.sequences.shape[1])


def _has_output_gradients(job: Job) -> bool:
    """Whether the gradients after the last block are there, or are needed no more."""
    layers = job.architecture.layers
    return any(job.work.done(step) is not None for step in (f"gradients {layers}", f"weights {layers - 1}"))


def _output_gradients(job: Job) -> None:
    """dL/d(hidden states) after the last block."""
    architecture = job.architecture
    with torch.device("meta"):
        norm = architecture.build_norm()
    weight = job.read(f"{architecture.final_norm}.weight").to(job.compute_dtype)
    norm.load_state_dict({"weight": weight}, assign=True)
    norm.requires_grad_(False)
    head = job.read(f"{architecture.head_owner}.weight").to(job.compute_dtype)
    source, target = job.activations(INPUTS, architecture.layers), job.activations(GRADIENTS, architecture.layers)

    def wave(start: int, stop: int) -> Tensor:
        seeded = [(hidden, sequence_seed(job.seed, start + i)) for i, hidden in enumerate(source.read(start, stop))]
        return torch.stack(job.workers.map(lambda item: output_gradient(item[0], norm, head, item[1]), seeded))

    target.write(wave)
    job.work.finish(f"gradients {architecture.layers}", [target.path], {})

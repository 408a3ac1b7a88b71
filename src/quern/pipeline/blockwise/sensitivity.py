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
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quern.checkpoint.files import read_json, write_json
from quern.checkpoint.safetensors_file import read_tensors
from quern.core.errors import BadFileError, UserError
from quern.core.machine.heap import release_freed
from quern.core.progress import Task
from quern.loading.padding import padding_record
from quern.pipeline.blockwise import output_gradients, work_units
from quern.pipeline.blockwise.job import Job
from quern.quantization.arithmetic import arithmetic
from quern.quantization.calibration import token_weights as passes
from quern.quantization.calibration.activations import ActivationFile
from quern.quantization.calibration.block import Block
from quern.quantization.calibration.drift import HELD_OUT
from quern.quantization.calibration.hessian import add_to_hessian
from quern.quantization.calibration.outputs import OutputStatistics
from quern.quantization.calibration.statistics import Statistics
from quern.quantization.calibration.token_weights import (
    BlockGradients,
    block_gradients,
    normalized,
    output_gradient,
    sequence_seed,
)

INPUTS, GRADIENTS, WEIGHTS, ROWS, SAMPLED, HEAD = "inputs", "gradients", "weights", "rows", "sampled", "head"
_TIMING = "timing.json"


def needed(job: Job) -> bool:
    """Whether the recipe's rounding or tuning reads Fisher token weights."""
    reads = job.uses_hessians or job.recipe.tuning is not None
    return job.recipe.calibration.token_weight == "fisher" and reads


def token_weights(job: Job, index: int) -> dict[str, Tensor]:
    """Squared gradients float32 ``(tokens,)`` of block ``index`` by linear, once ``run`` has ended."""
    return job.work.read_tensors(f"{WEIGHTS}/{index:04d}")


def head_statistics(job: Job) -> Statistics:
    """Of what the head reads in the unquantized model, each token weighted by its squared gradient at the logits."""
    kept = job.work.read_tensors(f"{WEIGHTS}/{HEAD}")
    _, scale = normalized(kept["squares"])
    return Statistics((kept["hessian"] / (scale or 1.0)).to(job.device), scale or 1.0, len(kept["squares"]))


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
    depends |= padding_record(job.checkpoint)  # numbers are added in another order
    depends["holds"] = "squared gradients, and the head's Hessian"
    return cache / f"token-weights-{hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Sample:
    """Gradients at the linears' outputs that are kept: of some rows, for the tokens of some sequences."""

    rows: Callable[[str, int], Tensor]
    """Of a linear, by its full name and number of rows: int64."""
    takes: Callable[[int], bool]
    """Whether a sequence is one of them."""


def run(job: Job, shared: Path | None = None, *, sample: Sample | None = None, keep: Collection[int] = ()) -> float:
    """The whole pass; continues where an earlier run was stopped.

    With ``shared`` (a ``shared_folder``) what lies there is taken over, or the result is put there. What a recipe that
    rounds by both sides needs besides, ``output_gradients`` says; where it ``recomputes``, the inputs of blocks and the
    gradients of their outputs stay until ``forget`` removes them, and nothing is taken over. The inputs of the blocks
    ``keep`` stay too. With ``sample`` gradients are kept: those of the embedding's outputs, and what ``sampled_gradients``
    and ``row_squares`` read. Returns the seconds that were spared: those that the pass took when it was made. Raises
    ``BadFileError`` for a damaged ``shared``.
    """
    layers = job.architecture.layers
    if all(job.work.done(f"weights {index}") is not None for index in range(layers)):
        return 0.0
    spared, whole, started = 0.0, job.work.done("inputs 0") is None, time.perf_counter()
    again = output_gradients.recomputes(job)
    if shared is not None and all(folder.is_dir() for folder in _shared(job, shared).values()) and not again:
        spared = _take_over(job, shared)
    else:
        _compute(job, sample)
        if shared is not None and whole:
            share(job, shared, time.perf_counter() - started)
    for index in range(layers + 1):
        if index not in keep and (not again or index == layers):
            job.activations(INPUTS, index).path.unlink(missing_ok=True)
    if sample is None:
        job.activations(GRADIENTS, 0).path.unlink(missing_ok=True)
    return spared


def output_statistics(job: Job, block: Block, linears: Sequence[str]) -> dict[str, OutputStatistics]:
    """Of the gradients at the outputs of some linears of ``block``, as it was before anything of it was rounded."""
    index = block.spec.index
    inputs, outer = job.activations(INPUTS, index), job.activations(GRADIENTS, index + 1)
    rows = {name: block.linear(name).out_features for name in linears}
    found = {name: OutputStatistics.of(count, job.device) for name, count in rows.items()}
    with block.recording(linears):
        for start, stop in inputs.waves():
            pairs = list(zip(inputs.read(start, stop), outer.read(start, stop), strict=True))
            results = job.workers.map(lambda pair: passes.output_gradients(block, *pair), pairs)
            for place, gradients in enumerate(results, start=start):
                judge = place % HELD_OUT == HELD_OUT - 1
                for name, some in zip(linears, gradients, strict=True):
                    found[name].add(some, judge, job.workers)
    return found


def forget(job: Job, index: int) -> None:
    """Remove what ``output_statistics`` of block ``index`` reads."""
    for kind, place in ((INPUTS, index), (GRADIENTS, index + 1)):
        job.activations(kind, place).path.unlink(missing_ok=True)
    output_gradients.forget(job, index)


def share(job: Job, shared: Path, seconds: float) -> None:
    """Leave the weights that ``run`` made, in ``seconds``, in the ``shared_folder`` for other jobs."""
    for kind, folder in _shared(job, shared).items():
        if not folder.is_dir():
            _put_into(folder, job, kind, seconds)


def _shared(job: Job, shared: Path) -> dict[str, Path]:
    """The folders of what is shared, by what it is called in the work folder."""
    if job.two_sided and not output_gradients.recomputes(job):
        return {WEIGHTS: shared, output_gradients.OUTPUTS: output_gradients.shared_folder(shared, job)}
    return {WEIGHTS: shared}


def _take_over(job: Job, shared: Path) -> float:
    assert job.sequences is not None
    width = int(job.architecture.config.hidden_size)
    head = read_tensors(shared / f"{HEAD}.safetensors")
    if {name: tuple(t.shape) for name, t in head.items()} != {
        "hessian": (width, width),
        "squares": (job.sequences.numel(),),
    }:
        raise BadFileError(shared, "does not hold the Hessian of this model's head", f"Remove {shared}")
    job.work.finish(HEAD, [job.work.write_tensors(f"{WEIGHTS}/{HEAD}", head)], {})
    if (gradients := _shared(job, shared).get(output_gradients.OUTPUTS)) is not None:
        output_gradients.take_over(job, gradients)
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


def _put_into(shared: Path, job: Job, kind: str, seconds: float) -> None:
    """Whole or not at all; what another process put there meanwhile stays. A job goes on without a place for it."""
    unfinished = shared.with_name(f".{shared.name}.{os.getpid()}")
    try:
        shutil.copytree(job.work.path(kind), unfinished, dirs_exist_ok=True)
        write_json(unfinished / _TIMING, {"seconds": seconds})
        os.rename(unfinished, shared)
    except (OSError, UserError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not shared.is_dir():
            job.progress.log(f"token weights are not kept in {shared.parent} for other recipes: {error}")


def _compute(job: Job, sample: Sample | None = None) -> None:
    layers, again = job.architecture.layers, output_gradients.recomputes(job)
    task = job.progress.task("token weights", 2 * layers + 1, _behind(job), work_units.token_weights(job))
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
        if not again:
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
            with block.lent(job.workers):
                following.write(partial(_run_wave, job, block, source), job.workers)
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
    whole = output_gradients.kept(job, index)
    gradients, asked = (
        output_gradients.Sums({n: len(sums[n]) for n in whole}, job.device),
        [linears.index(n) for n in whole],
    )
    rows = [] if sample is None else [sample.rows(block.spec.prefix + n, len(total)) for n, total in sums.items()]

    lent = job.workers.lend((block, tuple(linears), asked))

    def wave(start: int, stop: int) -> tuple[int, list[BlockGradients]]:
        taken = [rows if sample is not None and sample.takes(place) else [] for place in range(start, stop)]
        triples = list(zip(inputs.read(start, stop), outer.read(start, stop), taken, strict=True))
        return start, job.workers.spread(_gradients, lent, triples)

    def added(start: int, results: list[BlockGradients]) -> Tensor:
        for place, result in enumerate(results, start=start):
            gradients.add(job, place, result.outputs)
            collected.append(result.squares)
            for name, total in zip(linears, result.rows, strict=True):
                sums[name] += total
            for name, some in zip(linears, result.sampled, strict=False):
                kept[name].append(some.to(torch.bfloat16).cpu())
        return torch.stack([result.inputs for result in results])

    with nullcontext() if job.workers.elsewhere else block.recording(linears):
        inner.write_all(starmap(added, job.workers.ahead(wave, inputs.waves())))
    squares = torch.cat(collected, dim=1)
    path = job.work.write_tensors(f"{WEIGHTS}/{index:04d}", dict(zip(linears, squares, strict=True)))
    if whole:
        job.work.finish(f"{output_gradients.OUTPUTS} {index}", [gradients.write(job, index)], {})
    job.work.finish(f"gradients {index}", [inner.path], {})
    if sample is not None:
        written = [
            job.work.write_tensors(f"{ROWS}/{index:04d}", sums),
            job.work.write_tensors(f"{SAMPLED}/{index:04d}", {name: torch.cat(parts) for name, parts in kept.items()}),
        ]
        job.work.finish(f"{ROWS} {index}", written, {})
    job.work.finish(f"weights {index}", [path], {})


def _gradients(
    shared: tuple[Block, tuple[str, ...], list[int]], item: tuple[Tensor, Tensor, list[Tensor]]
) -> BlockGradients:
    block, linears, asked = shared
    with block.recording(linears):
        return block_gradients(block, *item, asked)


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

    width = architecture.config.hidden_size
    hessian, counted = torch.zeros(width, width, device=job.device), []

    def wave(start: int, stop: int) -> Tensor:
        seeded = [(hidden, sequence_seed(job.seed, start + i)) for i, hidden in enumerate(source.read(start, stop))]
        results = job.workers.map(lambda item: output_gradient(item[0], norm, head, item[1]), seeded)
        for result in results:
            add_to_hessian(hessian, result.inputs, result.squares, job.workers)
            counted.append(result.squares)
        return torch.stack([result.hidden for result in results])

    target.write(wave)
    kept = {"hessian": hessian, "squares": torch.cat(counted)}
    job.work.finish(HEAD, [job.work.write_tensors(f"{WEIGHTS}/{HEAD}", kept)], {})
    job.work.finish(f"gradients {architecture.layers}", [target.path], {})

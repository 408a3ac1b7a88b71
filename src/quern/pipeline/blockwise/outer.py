"""What lies outside of the decoder blocks: embedding, final norm and head, and the inputs of the first block."""

from __future__ import annotations

import time

import torch

from quern.codecs.base import codec_of
from quern.pipeline.blockwise import sensitivity
from quern.pipeline.blockwise.blocks import CHAIN
from quern.pipeline.blockwise.job import Job
from quern.pipeline.blockwise.record import record_of
from quern.quantization.block import RoundedLinear, round_linears
from quern.quantization.calibration.statistics import GroupStatistics
from quern.quantization.rounding.base import ROUNDINGS

EMBEDDING = "embedding"
"""The file that keeps the embedding as it was stored until the first block has its inputs."""


def quantize_outer(job: Job) -> None:
    """Embedding, final norm and head: each rounded, to nearest but for what the recipe says of the head, or taken over."""
    architecture = job.architecture
    last = architecture.layers + 1
    stages = {0: [architecture.embedding], last: [architecture.final_norm, *architecture.outer[1:]]}
    for stage, modules in stages.items():
        if job.work.done(f"outer {stage}") is not None:
            continue
        started = time.perf_counter()
        rounded: list[RoundedLinear] = []
        job.writer.begin(job.work, stage)
        for module in modules:
            weight = job.read(f"{module}.weight")
            if module in job.plan and job.plan[module].quantized:
                rounded += round_linears({module: weight}, job.plan, _statistics(job, module), job.workers)
                job.writer.put(module, rounded[-1].packed)
                kept = rounded[-1].weight.parts
            else:
                job.writer.put_plain(f"{module}.weight", weight)
                kept = {"weight": weight}
            if module == architecture.embedding and job.sequences is not None:
                job.work.finish(EMBEDDING, [job.work.write_tensors(EMBEDDING, kept)], {})
        files = job.writer.end()
        job.work.finish(f"outer {stage}", files, {**record_of(job, rounded), "seconds": time.perf_counter() - started})


def _statistics(job: Job, module: str) -> GroupStatistics:
    """What rounding ``module`` wants to know of its inputs."""
    if not ROUNDINGS.get(job.plan[module].rounding.method).needs_hessian:
        return GroupStatistics()
    return GroupStatistics({module: sensitivity.head_statistics(job)})


def start_chain(job: Job) -> None:
    """Inputs of the first block: the embedding as the artifact stores it."""
    if job.sequences is None or job.work.done(f"{CHAIN} 0") is not None or job.work.done("block 0") is not None:
        return
    name, sequences = job.architecture.embedding, job.sequences
    kept = job.work.read_tensors(EMBEDDING)
    if job.plan[name].quantized:
        dtypes = (job.work.done("outer 0") or {}).get("scale_dtypes", {})
        codec = codec_of(job.plan.changed(dtypes)[name].scheme)
        rows, index = torch.unique(sequences, return_inverse=True)
        shape = job.architecture.module_shapes()[f"{name}.weight"]
        table = codec.decode_rows((shape[0], shape[1]), kept, rows)
    else:
        table, index = kept["weight"], sequences
    store = job.activations(CHAIN, 0)
    store.write(lambda start, stop: table[index[start:stop]])
    job.work.finish(f"{CHAIN} 0", [store.path], {})
    job.work.path(f"{EMBEDDING}.safetensors").unlink()

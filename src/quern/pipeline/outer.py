"""What lies outside of the decoder blocks: embedding, final norm and head, and the inputs of the first block."""

from __future__ import annotations

import time

import torch

from quern.codecs.base import CODECS
from quern.pipeline.blocks import CHAIN, layer_error
from quern.pipeline.job import Job
from quern.quantization import scale_dtypes as scales
from quern.quantization.rounding.base import ROUNDINGS


def quantize_outer(job: Job) -> None:
    """Embedding, final norm and head: each rounded to nearest or taken over."""
    architecture, recipe = job.architecture, job.recipe
    last = architecture.layers + 1
    places = [(architecture.embedding, recipe.embedding, 0), (architecture.final_norm, None, last)]
    if not architecture.tied:
        places.append((architecture.head, recipe.head, last))
    nearest = ROUNDINGS.get("nearest")(recipe.rounding)
    for position in (0, last):
        if job.work.done(f"outer {position}") is not None:
            continue
        started, tensors, errors, dtypes = time.perf_counter(), {}, [], dict[str, str]()
        for module, scheme, where in places:
            if where != position:
                continue
            weight = job.read(f"{module}.weight")
            if scheme is None or not scheme.quantized:
                tensors[f"{module}.weight"] = weight
                continue
            codecs = scales.fitting({module: CODECS.get(scheme.codec)(scheme)}, {module: weight}, job.workers)
            dtypes |= scales.changes({module: scheme}, codecs)
            rounded = nearest.round(weight, codecs[module], None, job.workers)
            tensors |= job.format.encode(module, rounded.weight, None)
            errors.append(layer_error(module, rounded))
        path = job.work.write_tensors(f"artifact/{job.shard(position).removesuffix('.safetensors')}", tensors)
        record = {"layers": errors, "scale_dtypes": dtypes, "seconds": time.perf_counter() - started}
        job.work.finish(f"outer {position}", [path], record)


def start_chain(job: Job) -> None:
    """Inputs of the first block: the embedding as the artifact stores it."""
    if job.sequences is None or job.work.done(f"{CHAIN} 0") is not None or job.work.done("block 0") is not None:
        return
    name, sequences = job.architecture.embedding, job.sequences
    stored = job.work.read_tensors(f"artifact/{job.shard(0).removesuffix('.safetensors')}")
    dtypes = (job.work.done("outer 0") or {}).get("scale_dtypes", {})
    scheme, shape = (
        scales.changed({name: job.recipe.embedding}, dtypes)[name],
        job.checkpoint.info(f"{name}.weight").shape,
    )
    if scheme.quantized:
        codec = CODECS.get(scheme.codec)(scheme)
        parts = job.format.parts(name, scheme, (shape[0], shape[1]), stored)
        rows, index = torch.unique(sequences, return_inverse=True)
        table = codec.decode_rows((shape[0], shape[1]), parts, rows)
    else:
        table, index = stored[f"{name}.weight"], sequences
    store = job.activations(CHAIN, 0)
    store.write(lambda start, stop: table[index[start:stop]])
    job.work.finish(f"{CHAIN} 0", [store.path], {})

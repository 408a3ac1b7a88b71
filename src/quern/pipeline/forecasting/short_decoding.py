"""Short runs of the cpu engine on random codes: how fast a recipe's kernels are here, at the widths of the model.

As many blocks are made as fit ``MOST_BYTES``, at least one; all of them where they do. Time goes by block, and what the head
takes is measured apart, so that both can be carried over to the whole model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from quern import _native
from quern.architectures.base import architecture_of
from quern.checkpoint.checkpoint import open_checkpoint
from quern.core.artifact import quantization_of
from quern.core.engine import Session
from quern.core.machine.temporary import temporary_folder
from quern.engines.cpu import CpuEngine, MappedWeights
from quern.formats.base import reader_of
from quern.pipeline.forecasting.counted import Case
from quern.pipeline.forecasting.random_artifact import write_random_artifact
from quern.pipeline.forecasting.shrunk import shrunk

MOST_BYTES = 384 << 20
"""Of the random blocks: some times a last-level cache, so that memory is read."""
MOST_HEAD = 80 << 20
"""Weights of the random embedding and head, which in 4 bits are more than a last-level cache holds; products take time in
proportion to rows."""
PROMPT = 512
NEW = 24
ROUNDS = 3


@dataclass(frozen=True)
class Pace:
    """What was measured, carried over to the whole model; seconds."""

    token_block: float
    """To decode one token in one block, behind a prompt."""
    token_head: float
    """To decode one token, in the head."""
    prompt_block: float
    """To read the prompt, in one block."""
    prompt: int
    """Tokens of it."""
    blocks: int
    """That were run."""
    bytes: int
    """That a token read in these blocks and the head."""


def pace_of(case: Case, block_bytes: int, threads: int, context: int) -> Pace | str:
    """Time random codes; or why that is not possible."""
    architecture, config = case.architecture, dict(case.subject.checkpoint.config)
    recipe = case.recipe.model_copy(update={"format": "quern", "storage": "plain"})
    layers = min(architecture.layers, max(1, MOST_BYTES // max(1, block_bytes)))
    vocabulary = int(architecture.config.vocab_size)
    rows = min(vocabulary, max(256, MOST_HEAD // int(architecture.config.hidden_size)))
    made = shrunk(config, layers=layers, vocabulary=rows)
    obstacle = _obstacle(made)
    if obstacle is not None:
        return obstacle
    most = int(architecture.config.max_position_embeddings)
    prompt = max(1, min(PROMPT, context, most - NEW))
    with temporary_folder("forecast") as folder:
        path = write_random_artifact(folder / "artifact", made, recipe)
        if (reason := CpuEngine().runs(open_checkpoint(path))) is not None:
            return f"the cpu engine does not run it: {reason}"
        model = CpuEngine().load(path, threads=threads)
        ids = [token % rows for token in range(prompt)]
        model.start().feed(ids[: min(16, prompt)])
        prompts, tokens = [], []
        new = min(NEW, prompt, most - prompt)
        for _ in range(ROUNDS):
            session = model.start()
            prompts.append(_seconds(partial(session.feed, ids)))
            tokens.append(_seconds(partial(_feed_each, session, ids[:new])) / new)
        head = _head_seconds(path, made, threads)
        read = model.bytes_per_token()
    token, whole = statistics.median(tokens), statistics.median(prompts)
    return Pace(
        token_block=max(token - head, 0.05 * token) / layers,
        token_head=head * vocabulary / rows,
        prompt_block=max(whole - head, 0.05 * whole) / layers,
        prompt=prompt,
        blocks=layers,
        bytes=read,
    )


def _obstacle(config: dict[str, Any]) -> str | None:
    """Why a shrunk model cannot be made."""
    try:
        architecture_of(config)
    except ValueError as error:
        return f"a model of fewer blocks cannot be made: {error}"
    return None


def _head_seconds(path: Any, config: dict[str, Any], threads: int) -> float:
    """Of one product with the head."""
    architecture, checkpoint = architecture_of(config), open_checkpoint(path)
    reader = reader_of(quantization_of(checkpoint.config), architecture)
    weights = MappedWeights(checkpoint, {} if reader is None else reader.plan())
    shape = (int(config["vocab_size"]), int(config["hidden_size"]))
    matrix = weights.matrix(architecture.head_owner, shape, None)
    inputs = np.ones((1, shape[1]), np.float32)
    return statistics.median(_native.time_multiply([matrix], inputs, threads, 8))


def _feed_each(session: Session, ids: list[int]) -> None:
    for token in ids:
        session.feed([token])


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin

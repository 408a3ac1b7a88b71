"""What a training will need at its peak, said before it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping

import psutil

from quern.architectures.base import Architecture
from quern.codecs.base import codec_of
from quern.core.errors import OutOfMemoryCapError, option
from quern.core.scheme import CodecScheme
from quern.core.text.units import bytes_text, rounded_up
from quern.pipeline.blockwise.memory_plan import LIBRARIES
from quern.quantization.calibration.token_weights import LOGIT_TOKENS
from quern.quantization.training.loop import BATCH, Kind

LATENT_COPIES = 4
"""Float32 numbers for each weight that has a latent one: itself, both moments of Adam, and one while a state is written."""
OPEN_COPIES = 6
"""Float32 copies of a block's weights while it is in use: decoded, rotated back, their graphs and their gradients."""
ACTIVATION_COPIES = 24
"""Float32 copies of the widest activations of a sequence that a block keeps for its backward pass."""
ROW_COPIES = 3
"""The same where factors of rows are trained, and no gradient of a weight is made."""
LOGIT_COPIES = 5
HEAD_COPIES = 3
"""Of embedding and heads: the student's embedding, and both heads."""


def peak(architecture: Architecture, schemes: Mapping[str, CodecScheme], kind: Kind, time: int, threads: int) -> int:
    """Bytes of the process with a student of this kind and sequences of ``time`` tokens, estimated from shapes.

    ``schemes``: of the quantized linears by full name.
    """
    hidden, vocabulary = int(architecture.config.hidden_size), int(architecture.config.vocab_size)
    linears = {name: architecture.linears[name].shape for name in schemes}
    weights = sum(rows * columns for rows, columns in linears.values())
    packed = sum(
        math.prod(size) * dtype.itemsize
        for name, scheme in schemes.items()
        for size, dtype in codec_of(scheme).part_shapes(linears[name]).values()
    )
    block = max(sum(math.prod(linear.shape) for linear in spec.linears) for spec in architecture.blocks)
    widest = max(max(shape) for shape in linears.values())
    kept = packed + (weights * 4 * LATENT_COPIES if kind == "codes" else 0)
    copies = OPEN_COPIES + threads if kind == "codes" else ROW_COPIES
    use = 4 * block * copies + threads * ACTIVATION_COPIES * 4 * time * widest
    states = 4 * BATCH * time * hidden * (architecture.layers + 4)
    heads = 4 * vocabulary * hidden * HEAD_COPIES
    logits = threads * LOGIT_COPIES * 4 * LOGIT_TOKENS * vocabulary
    process = int(psutil.Process().memory_info().rss) + LIBRARIES
    return process + int(kept) + heads + states + max(use, logits)


def check(
    architecture: Architecture,
    schemes: Mapping[str, CodecScheme],
    kind: Kind,
    time: int,
    threads: int,
    cap: int | None,
) -> None:
    """Raise ``OutOfMemoryCapError`` with the least that would do where ``cap`` bytes do not."""
    if cap is None or (needed := peak(architecture, schemes, kind, time, threads)) <= cap:
        return
    least = rounded_up(needed)
    text = bytes_text(least)
    enough = option(f"memory={least:_}", f"--memory {text.replace(' ', '')}")
    less = f"fewer {option('threads', '--threads')}"
    if kind == "codes":
        less += f", or {option('train=scales', '--train scales')}, which keeps no weights in full precision"
    raise OutOfMemoryCapError(
        f"a memory cap of {bytes_text(cap)} is too small: training the {kind} of this model needs {text}. Give at least "
        f"{enough}, or {less}",
        needed,
    )

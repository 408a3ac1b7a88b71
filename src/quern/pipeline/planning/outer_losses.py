"""Losses of embedding and head, which lie outside of the decoder blocks; in nats a token, as those of the linears.

*Head.* Its rounding changes the logits of a token from W h to W' h, and nothing else. So the mean divergence of the two
predictions is computed as it is, without an approximation, on some of the calibration tokens.

*Embedding.* Row w enters the hidden states wherever token w stands, with the gradient g_t = dL/d(embedding's output) there.
As for linears (``quantization/candidate_losses.py``), errors of different tokens and columns are taken as uncorrelated:

    mean KL = 1 / (2 T) sum_t sum_j g_tj^2 e_tj^2,    e_t = the error of token t's row.

A matrix that is both costs both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from quern.codecs.base import codec_of
from quern.core.machine.parallel import Workers, pieces
from quern.core.recipe_parts import NEAREST
from quern.core.scheme import CodecScheme
from quern.pipeline.blockwise import sensitivity
from quern.pipeline.blockwise.job import Job, fitting_outer
from quern.quantization import scale_dtypes
from quern.quantization.calibration.activations import ActivationFile
from quern.quantization.calibration.token_weights import LOGIT_TOKENS
from quern.quantization.rounding.base import ROUNDINGS

HEAD_TOKENS = 2048
"""Tokens whose predictions are compared, at most."""
ROWS = 4096
"""Rows of a table that are rounded at a time: a multiple of what codecs want."""


def outer_schemes(job: Job, module: str) -> tuple[CodecScheme, ...]:
    """What embedding or head may get."""
    assert job.recipe.allocation is not None
    fixed = job.recipe.embedding if module == job.architecture.embedding else job.recipe.head
    asked = job.recipe.allocation.outer or (fixed,)
    return tuple(plan.scheme for plan in fitting_outer(asked, job.architecture, module))


def outer_losses(job: Job, outputs: ActivationFile) -> dict[str, list[float]]:
    """By module the loss of each of its ``outer_schemes``. ``outputs``: hidden states after the last block."""
    architecture = job.architecture
    task = job.progress.task("losses of embedding and head", len(architecture.outer))
    found: dict[str, list[float]] = {}
    for module in architecture.outer:
        schemes = outer_schemes(job, module)
        weight = job.read(f"{module}.weight")
        losses = [0.0] * len(schemes)
        if module == architecture.embedding:
            losses = _added(losses, _embedding_losses(job, weight, schemes))
        if module == architecture.head_owner:
            losses = _added(losses, _head_losses(job, weight, schemes, outputs))
        found[module] = losses
        task.advance()
    task.done()
    return found


def _added(first: list[float], second: list[float]) -> list[float]:
    return [a + b for a, b in zip(first, second, strict=True)]


def _embedding_losses(job: Job, weight: Tensor, schemes: tuple[CodecScheme, ...]) -> list[float]:
    assert job.sequences is not None
    gradients = job.activations(sensitivity.GRADIENTS, 0)
    used, place = torch.unique(job.sequences, return_inverse=True)
    squares = torch.zeros(len(used), weight.shape[1], dtype=torch.float64)
    for start, stop in gradients.waves():
        part = gradients.read(start, stop).double().square_()
        squares.index_add_(0, place[start:stop].reshape(-1), part.reshape(-1, weight.shape[1]))
    rows = weight[used].float()

    def loss(rounded: Tensor) -> float:
        return float((squares * (rounded - rows).double().square()).sum()) / (2 * job.sequences.numel())  # type: ignore[union-attr]

    return [loss(_rounded(rows, scheme, job.workers)) if scheme.quantized else 0.0 for scheme in schemes]


def _head_losses(job: Job, weight: Tensor, schemes: tuple[CodecScheme, ...], outputs: ActivationFile) -> list[float]:
    hidden = _normed(job, _some_tokens(outputs))
    return [
        mean_divergence(hidden, weight, lambda rows, scheme=scheme: _rounded(rows, scheme, job.workers), job.workers)  # type: ignore[misc]
        if scheme.quantized
        else 0.0
        for scheme in schemes
    ]


def mean_divergence(hidden: Tensor, weight: Tensor, rounded: Callable[[Tensor], Tensor], workers: Workers) -> float:
    """Mean KL divergence in nats of the predictions that ``rounded`` rows of a head make from those that it makes.

    ``hidden`` float32 ``(tokens, width)``, ``weight`` ``(vocabulary, width)``. Logits of ``LOGIT_TOKENS`` tokens are in
    memory for each worker.
    """
    table = weight.float()
    other = torch.cat([rounded(table[start:stop]) for start, stop in pieces(len(table), ROWS)])

    def part(tokens: tuple[int, int]) -> float:
        rows = hidden[tokens[0] : tokens[1]]
        expected = functional.linear(rows, table).double().log_softmax(-1)
        got = functional.linear(rows, other).double().log_softmax(-1)
        return float((expected.exp() * (expected - got)).sum())

    return sum(workers.map(part, pieces(len(hidden), LOGIT_TOKENS))) / len(hidden)


def _some_tokens(outputs: ActivationFile) -> Tensor:
    """Evenly spaced tokens' hidden states ``(tokens, width)``."""
    step = -(-outputs.shape[0] * outputs.shape[1] // HEAD_TOKENS)
    parts, behind = [], 0
    for start, stop in outputs.waves():
        rows = outputs.read(start, stop).reshape(-1, outputs.shape[2])
        parts.append(rows[-behind % step :: step])
        behind += len(rows)
    return torch.cat(parts)


def _normed(job: Job, hidden: Tensor) -> Tensor:
    """What the head reads, float32."""
    with torch.device("meta"):
        norm: nn.Module = job.architecture.build_norm()
    norm.load_state_dict({"weight": job.read(f"{job.architecture.final_norm}.weight").float()}, assign=True)
    with torch.no_grad():
        found: Tensor = norm(hidden.float().to(job.device))
    return found


def _rounded(rows: Tensor, scheme: CodecScheme, workers: Workers) -> Tensor:
    """Float32 ``rows`` of a table as they would be stored under ``scheme``, rounded to nearest."""
    codec = scale_dtypes.fitting({"": codec_of(scheme)}, {"": rows}, workers)[""]
    return ROUNDINGS.get(NEAREST.method)(NEAREST).round(rows, codec, None, workers).decoded

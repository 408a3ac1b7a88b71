"""What each candidate would cost a linear, as a share of the mean KL divergence in nats a token.

Let y_t = W x_t be a linear's output for token t, W + E its rounded weight, and L the negative log-likelihood of labels that
are drawn from the model itself, summed over the tokens. The Fisher information is the Hessian of the KL divergence
(Kullback and Leibler 1951; Amari 1998, doi:10.1162/089976698300017746), so to second order the divergences of all T tokens
add up to

    sum KL = 1/2 E_labels [ ( sum_t g_t . E x_t )^2 ],    g_t = dL / dy_t.

*Tokens*: errors of different tokens are taken as uncorrelated, which leaves 1/2 sum_t (g_t . E x_t)^2. *Rows*: rounding
errors of different rows E_i have nothing to do with each other, so that on average

    mean KL = 1 / (2 T) sum_t sum_i g_ti^2 (E_i x_t)^2.

Errors of different linears, too, are taken as uncorrelated: their shares add up. Were gradients and errors spread evenly
over the R rows, this would be tr(E H E^T) / (2 R T) with the Hessian H = sum_t |g_t|^2 x_t x_t^T by which GPTQ rounds; they
are not.

Error feedback fits the tokens that H is made of, and costs more on others. So the candidates are rounded by one part of the
tokens and judged by the gradients and inputs of others.

Rows are rounded independently, so some of them tell what all of them cost: errors go with a row's size, and the loss of the
rounded rows is scaled by the sum over all rows of |W_i|^2 sum_t g_ti^2, over that of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quern.codecs.base import codec_of
from quern.core.machine.parallel import Workers
from quern.core.plan import LinearPlan
from quern.core.seeds import generator
from quern.quantization import scale_dtypes
from quern.quantization.calibration.statistics import Statistics
from quern.quantization.rounding.base import ROUNDINGS
from quern.quantization.rounding.factor import Factor, factorize
from quern.rotation.rotation import rotate

PIECE = 512
"""Tokens that are judged by at a time."""
_Kind = tuple[bool, float, bool]
"""What a factorization depends on: rotation, damping, order."""


@dataclass(frozen=True)
class Judges:
    """The tokens that candidates are judged by."""

    inputs: Tensor
    """What the linear reads of them, ``(met tokens, columns)``, unrotated."""
    gradients: Tensor
    """dL/dy_ti ``(met tokens, sampled rows)``."""
    tokens: int
    """How many there are, whichever met the linear."""


def candidate_losses(
    weight: Tensor,
    plans: Sequence[LinearPlan],
    rounding: Statistics,
    judges: Judges,
    *,
    row_squares: Tensor,
    signs: Tensor | None,
    rows: Tensor,
    workers: Workers,
) -> list[float]:
    """The loss of each of ``plans`` for ``weight`` ``(rows, columns)``, in nats a token; 0 for one that keeps the weight.

    ``rounding``: statistics of the unrotated inputs of the tokens to round by, weighted by squared gradients; its Hessian is
    used up. ``row_squares``: sum_t g_ti^2 ``(rows,)`` up to a factor. ``signs``: packed signs of the rotation that some
    plans have. ``rows``: int64, those that are rounded. The plans are rounded side by side, each by one worker.
    """
    hessians = _hessians(_full(rounding.take_hessian()), plans, signs)
    factors: dict[_Kind, Factor] = {}
    for plan in plans:
        kind = _kind(plan)
        if plan.quantized and ROUNDINGS.get(plan.rounding.method).needs_hessian and kind not in factors:
            sweeps = any(plan.rounding.sweeps for plan in plans)
            factors[kind] = factorize(hessians[kind[0]].clone(), *kind[1:], workers, keep=sweeps)
    sample, inputs = weight[rows].float(), judges.inputs.float()
    turned = {False: (sample, inputs)}
    if signs is not None and True in hessians:
        turned[True] = rotate(sample, signs), rotate(inputs, signs)
    part = float(row_squares[rows].double() @ _squares(sample))
    scale = float(row_squares.double() @ _squares(weight)) / part if part > 0 else 0.0
    squares = judges.gradients.float().square_()

    return workers.spread(_loss, _Sampled(turned, factors, squares, scale, judges.tokens), plans)


@dataclass(frozen=True)
class _Sampled:
    """The rows of a linear that are rounded, and what of them is judged by."""

    turned: dict[bool, tuple[Tensor, Tensor]]
    """Rotated (True) and not: the rows, and the inputs of the tokens that judge."""
    factors: dict[_Kind, Factor]
    squares: Tensor
    """Of the gradients."""
    scale: float
    """Loss of all rows over that of these."""
    tokens: int


def _loss(shared: _Sampled, plan: LinearPlan) -> float:
    if not plan.quantized:
        return 0.0
    kind = _kind(plan)
    rows, inputs = shared.turned[kind[0]]
    error = rows - _rounded(rows, plan, shared.factors.get(kind))
    pairs = zip(torch.split(inputs, PIECE), torch.split(shared.squares, PIECE), strict=True)
    total = sum(float((each * (some @ error.T).square_()).double().sum()) for some, each in pairs)
    return shared.scale * total / (2 * shared.tokens)


def sampled_rows(rows: int, most: int, seed: int, linear: str) -> Tensor:
    """At most ``most`` of ``rows`` rows, int64, in order, drawn for each linear by the seed; all where there are no more."""
    if rows <= most:
        return torch.arange(rows)
    chosen = generator(seed, "rows of candidates", linear).choice(rows, most, replace=False)
    return torch.from_numpy(chosen).sort().values


def _kind(plan: LinearPlan) -> _Kind:
    return plan.rotation is not None, plan.rounding.damping, plan.rounding.activation_order


def _full(upper: Tensor) -> Tensor:
    """The whole of a symmetric matrix of which the upper triangle was kept, in its place."""
    upper.triu_()
    upper += upper.triu(1).T
    return upper


def _hessians(hessian: Tensor, plans: Sequence[LinearPlan], signs: Tensor | None) -> dict[bool, Tensor]:
    """The Hessian of rotated (True) and unrotated inputs, those that some plan reads. ``hessian`` is not kept in vain."""
    found: dict[bool, Tensor] = {}
    kinds = {plan.rotation is not None for plan in plans if plan.quantized}
    if False in kinds:
        found[False] = hessian
    if True in kinds:
        assert signs is not None
        once = rotate(hessian, signs)
        del hessian
        found[True] = rotate(once.T, signs)
    return found


def _squares(weight: Tensor) -> Tensor:
    """Squared norms of the rows, float64."""
    return torch.cat([part.double().square().sum(1) for part in torch.split(weight, 1024)])


def _rounded(weight: Tensor, plan: LinearPlan, factor: Factor | None) -> Tensor:
    """Float32 ``weight`` ``(rows, columns)``, rotated if the plan says so, as it would be stored."""
    alone = Workers(1)  # several plans are in work at once
    codec = scale_dtypes.fitting({"": codec_of(plan.scheme)}, {"": weight}, alone)[""]
    return ROUNDINGS.get(plan.rounding.method)(plan.rounding).round(weight, codec, factor, alone).decoded

"""What each candidate would cost a linear, as a share of the mean KL divergence in nats a token.

Let y_t = W x_t be a linear's output for token t, W + E its rounded weight, and L the negative log-likelihood of labels that
are drawn from the model itself, summed over the tokens. The Fisher information is the Hessian of the KL divergence
(Kullback and Leibler 1951; Amari 1998, doi:10.1162/089976698300017746), so to second order the divergences of all T tokens
add up to

    sum KL = 1/2 E_labels [ ( sum_t g_t . E x_t )^2 ],    g_t = dL / dy_t.

Three steps make a number of it that one scalar a token and one a row suffice for. *Tokens*: errors of different tokens are
taken as uncorrelated, which leaves 1/2 sum_t (g_t . E x_t)^2. *Rows*: rounding errors of different rows have nothing to do
with each other, so that (g . e)^2 is sum_i g_i^2 e_i^2 on average. *Separation*: some tokens matter more and some rows do,
and g_ti^2 is taken as |g_t|^2 s_i / R, with s_i = R sum_t g_ti^2 / sum_t |g_t|^2, whose mean over the R rows is 1. With the
Hessian H = sum_t |g_t|^2 x_t x_t^T, which rounding uses anyway, and the rows E_i of the error

    mean KL = sum_i s_i E_i H E_i^T / (2 R T).

Errors of different linears, too, are taken as uncorrelated: their shares add up. The Hessian that calibration keeps has
token weights of mean 1; ``Statistics.loss_scale`` is what they were divided by. Damping is no part of the loss.

Error feedback fits the tokens that H is made of, and costs more on others. So the candidates are rounded by one part of the
tokens and judged by the Hessian of the other.

Rows are rounded independently, so some of them tell what all of them cost: errors go with a row's size, and the loss of the
rounded rows is scaled by s_i times the squared norms of all rows over theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quern.codecs.base import codec_of
from quern.core.parallel import Workers
from quern.core.plan import LinearPlan
from quern.core.seeds import generator
from quern.quantization import scale_dtypes
from quern.quantization.calibration.statistics import Statistics
from quern.quantization.rounding.base import ROUNDINGS
from quern.quantization.rounding.factor import Factor, factorize
from quern.rotation.rotation import rotate

_Kind = tuple[bool, float, bool]
"""What a factorization depends on: rotation, damping, order."""


def candidate_losses(
    weight: Tensor,
    plans: Sequence[LinearPlan],
    rounding: Statistics,
    judging: Statistics,
    *,
    tokens: int,
    row_weights: Tensor,
    signs: Tensor | None,
    rows: Tensor,
    workers: Workers,
) -> list[float]:
    """The loss of each of ``plans`` for ``weight`` ``(rows, columns)``, in nats a token; 0 for one that keeps the weight.

    ``rounding`` and ``judging`` are statistics of the unrotated inputs of the tokens to round by and to judge by, weighted
    by squared gradients; their Hessians are used up. ``tokens``: how many the calibration text has to judge by, whichever
    met the linear. ``row_weights``: the s_i, ``(rows,)``, of mean 1. ``signs``: packed signs of the rotation that some plans
    have. ``rows``: int64, those that are rounded. The plans are rounded side by side, each by one worker.
    """
    judged = _hessians(_full(judging.take_hessian()), plans, signs)
    hessians = _hessians(_full(rounding.take_hessian()), plans, signs)
    factors: dict[_Kind, Factor] = {}
    for plan in plans:
        kind = _kind(plan)
        if plan.quantized and ROUNDINGS.get(plan.rounding.method).needs_hessian and kind not in factors:
            factors[kind] = factorize(hessians[kind[0]].clone(), *kind[1:], workers)
    sample, importance = weight[rows].float(), row_weights[rows].double()
    turned = {False: sample} if signs is None else {False: sample, True: rotate(sample, signs)}
    part = float(importance @ _squares(sample))
    scale = judging.loss_scale / (2 * len(weight) * tokens)
    scale *= float(row_weights.double() @ _squares(weight)) / part if part > 0 else 0.0

    def loss(plan: LinearPlan) -> float:
        if not plan.quantized:
            return 0.0
        kind = _kind(plan)
        return scale * float(importance @ _quadratic(turned[kind[0]], plan, factors.get(kind), judged[kind[0]]))

    return workers.map(loss, plans)


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


def _quadratic(weight: Tensor, plan: LinearPlan, factor: Factor | None, hessian: Tensor) -> Tensor:
    """E_i H E_i^T float64 ``(rows,)`` of rounding float32 ``weight`` by ``plan``; both are rotated if the plan says so."""
    alone = Workers(1)  # several plans are in work at once
    codec = scale_dtypes.fitting({"": codec_of(plan.scheme)}, {"": weight}, alone)[""]
    rounded = ROUNDINGS.get(plan.rounding.method)(plan.rounding).round(weight, codec, factor, alone)
    error = weight - rounded.decoded
    return torch.cat([((part @ hessian) * part).double().sum(1) for part in torch.split(error, 256)])

"""Losses of candidates: the units of KL, against divergences that are computed as they are."""

import pytest
import torch
from torch.nn import functional

from quern.codecs.base import codec_of
from quern.core.machine.parallel import Workers
from quern.core.plan import KEPT, LinearPlan
from quern.core.recipe_parts import Rounding, Transform
from quern.core.scheme import parse_scheme
from quern.pipeline.planning.outer_losses import mean_divergence
from quern.quantization.calibration.hessian import add_to_hessian
from quern.quantization.calibration.statistics import Statistics
from quern.quantization.calibration.token_weights import normalized
from quern.quantization.candidate_losses import Judges, candidate_losses, sampled_rows
from quern.rotation.rotation import pack_signs

COLUMNS, ROWS, VOCABULARY, TOKENS = 64, 256, 50, 6000
NEAREST, GPTQ = Rounding(method="nearest"), Rounding()
EIGHT = parse_scheme({"bits": 8, "granularity": "channel"})
FOUR = parse_scheme({"bits": 4, "group_size": 32})
ROTATION = Transform(method="hadamard")


class Model:
    """Softmax of ``head @ (weight @ x)``: one linear between inputs and logits, so that the gradient at its output is known."""

    def __init__(self, seed: int, spread: float = 1.0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(ROWS, COLUMNS, generator=random) * COLUMNS**-0.5
        self.head = torch.randn(VOCABULARY, ROWS, generator=random) * spread * ROWS**-0.5
        self.inputs = torch.randn(TOKENS, COLUMNS, generator=random) * torch.linspace(0.2, 2, COLUMNS)
        self.random = random

    def logits(self, weight: torch.Tensor) -> torch.Tensor:
        return self.inputs.double() @ weight.double().T @ self.head.double().T

    def divergence(self, weight: torch.Tensor) -> float:
        """Mean KL in nats a token of the model with another weight."""
        expected, got = (self.logits(w).log_softmax(-1) for w in (self.weight, weight))
        return float((expected.exp() * (expected - got)).sum(-1).mean())

    def gradients(self) -> torch.Tensor:
        """At the linear's output, for drawn labels: float32 ``(TOKENS, ROWS)``."""
        prediction = self.logits(self.weight).softmax(-1).float()
        labels = torch.multinomial(prediction, 1, generator=self.random)
        return prediction.scatter_add(1, labels, torch.full((TOKENS, 1), -1.0)) @ self.head

    def losses(self, plans, signs=None, rows=None, seen=TOKENS, workers=2):
        """By all tokens; rounded by the first ``seen`` of them."""
        gradients, rows = self.gradients(), torch.arange(ROWS) if rows is None else rows
        weights, scale = normalized(gradients[:seen].square().sum(1))
        hessian = torch.zeros(COLUMNS, COLUMNS)
        add_to_hessian(hessian, self.inputs[:seen], weights, Workers(1))
        return candidate_losses(
            self.weight.clone(),
            plans,
            Statistics(hessian, scale, seen),
            Judges(self.inputs, gradients[:, rows], TOKENS),
            row_squares=gradients.square().sum(0),
            signs=signs,
            rows=rows,
            workers=Workers(workers),
        )


def rounded(model: Model, plan: LinearPlan) -> torch.Tensor:
    """To nearest, without quern's rounding loop."""
    codec = codec_of(plan.scheme)
    encoder = codec.encoder(model.weight.clone(), model.weight, refit=False)
    return encoder.round_all(model.weight.clone())


@pytest.mark.parametrize("seed", range(4))
def test_the_prediction_is_the_divergence(seed):
    """Head, rows and errors are random, so the three steps of the derivation hold on average. What is left is chance: of the
    quadratic form over rows, sum_ij A_ij e_i e_j with A of rank < VOCABULARY, whose relative deviation for one token is
    sqrt(2 / VOCABULARY) = .2 at most and shrinks with the number of independent directions of the error, COLUMNS: .2 / 8 =
    .025; and of labels drawn once for 6000 tokens, sqrt(2 / 6000) = .02. Five deviations of both together: .16.
    """
    model = Model(seed)
    plans = [LinearPlan(EIGHT, NEAREST), LinearPlan(FOUR, NEAREST)]
    for plan, predicted in zip(plans, model.losses(plans), strict=True):
        assert predicted == pytest.approx(model.divergence(rounded(model, plan)), rel=0.16), plan.scheme
    eight, four = model.losses(plans)
    assert four > 50 * eight, "the loss is of the rounding, not of the model"


@pytest.mark.parametrize("seed", range(2))
def test_rows_count_as_their_gradients_say(seed):
    """Rows that the head hardly reads cost hardly anything, though their errors are the largest. The tolerance is the one above,
    for a third of the rows: times sqrt(3)."""
    model = Model(seed)
    importance = torch.linspace(2, 0.05, ROWS)
    model.head *= importance
    plain = rounded(model, LinearPlan(EIGHT, NEAREST)) - model.weight
    assert float(plain[-20:].norm() / plain[:20].norm()) == pytest.approx(1, rel=0.5)
    model.weight /= importance[:, None]
    plan = LinearPlan(EIGHT, NEAREST)
    (predicted,) = model.losses([plan])
    assert predicted == pytest.approx(model.divergence(rounded(model, plan)), rel=0.28)


def test_feedback_is_judged_by_other_tokens():
    """GPTQ that has seen few tokens fits them, and by all tokens costs more than GPTQ that has seen all."""
    few, every = (Model(7).losses([LinearPlan(FOUR, GPTQ)], seen=seen)[0] for seen in (80, TOKENS))
    assert few > 1.1 * every


def test_workers_change_nothing():
    signs = pack_signs(torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1)).numpy() < 0.5)
    plans = [LinearPlan(FOUR, GPTQ), LinearPlan(EIGHT, GPTQ, ROTATION)]
    assert Model(8).losses(plans, signs, workers=1) == Model(8).losses(plans, signs, workers=3)


def test_a_wrong_factor_would_be_seen():
    """Half of the Fisher form, divided by rows: neither twice nor a row's share less is within the tolerance above."""
    model = Model(1)
    (predicted,) = model.losses([LinearPlan(FOUR, NEAREST)])
    measured = model.divergence(rounded(model, LinearPlan(FOUR, NEAREST)))
    for wrong in (2, 0.5, ROWS, 1 / ROWS):
        assert predicted * wrong != pytest.approx(measured, rel=0.16)


def test_feedback_and_rotation_are_what_the_plan_says():
    model = Model(5)
    signs = pack_signs(torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1)).numpy() < 0.5)
    plans = [
        LinearPlan(FOUR, NEAREST),
        LinearPlan(FOUR, GPTQ),
        LinearPlan(FOUR, GPTQ, ROTATION),
        KEPT,
        LinearPlan(EIGHT, Rounding(activation_order=True)),
    ]
    nearest, gptq, turned, kept, ordered = model.losses(plans, signs)
    assert kept == 0
    assert gptq < nearest
    assert turned != gptq
    assert 0 < ordered < gptq / 50
    alone = model.losses(plans[2:3], signs)
    assert alone == pytest.approx([turned], rel=0.05), "but for the labels, a plan does not depend on its neighbours"


def test_some_rows_tell_what_all_cost():
    model = Model(6)
    model.weight *= torch.linspace(0.1, 3, ROWS)[:, None]
    plan = [LinearPlan(FOUR, NEAREST)]
    (whole,) = model.losses(plan)
    model.random.manual_seed(0)
    (part,) = model.losses(plan, rows=sampled_rows(ROWS, 64, 3, "x"))
    assert part == pytest.approx(whole, rel=0.1)  # of 64 rows with 64 errors each: sqrt(2 / 4096) = .02, and the labels
    assert part != whole


def test_rows_are_drawn_by_the_seed_and_the_name():
    assert sampled_rows(10, 10, 0, "a").tolist() == list(range(10))
    first = sampled_rows(1000, 100, 0, "a")
    assert torch.equal(first, sampled_rows(1000, 100, 0, "a"))
    assert len(set(first.tolist())) == 100
    assert torch.equal(first, first.sort().values)
    assert not torch.equal(first, sampled_rows(1000, 100, 0, "b"))
    assert not torch.equal(first, sampled_rows(1000, 100, 1, "a"))


def test_the_heads_divergence_is_exact():
    random = torch.Generator().manual_seed(2)
    hidden, head = torch.randn(700, 32, generator=random), torch.randn(90, 32, generator=random)
    other = head + 0.1 * torch.randn(90, 32, generator=random)
    found = mean_divergence(hidden, head, lambda rows: rows + (other - head), Workers(2))
    expected, got = ((hidden.double() @ w.double().T).log_softmax(-1) for w in (head, other))
    assert found == pytest.approx(
        float(functional.kl_div(got, expected, log_target=True, reduction="batchmean")), rel=1e-4
    )
    assert mean_divergence(hidden, head, lambda rows: rows, Workers(2)) == 0

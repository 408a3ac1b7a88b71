"""Weights, plans and statistics in, rounded linears out; and what a tap hands out of experts."""

import pytest
import torch
from artifacts import INT8, small_recipe
from schemes import gaussian

from quern.architectures.base import BlockSpec, LinearSpec, Source, parameter_reader
from quern.architectures.routing import routed_to, routed_tokens
from quern.codecs.base import Encoder, decode
from quern.core.errors import UserError
from quern.core.machine.parallel import Workers
from quern.core.plan import plan_for
from quern.core.recipe_parts import Rounding
from quern.quantization.block import round_linears
from quern.quantization.calibration.block import Tap
from quern.quantization.calibration.statistics import Wanted, add_tap, collector
from quern.quantization.rounding.factor import factorize
from quern.quantization.rounding.gptq import Gptq
from quern.rotation.rotation import pack_signs, rotate

COLUMNS, TOKENS = 32, 90
GROUPS = {"bits": 3, "group_size": 16}


@pytest.fixture(scope="module")
def workers():
    pool = Workers(1)
    yield pool
    pool.close()


def inputs(seed: int = 0) -> torch.Tensor:
    """Columns that go together, so that one can make good what another got wrong."""
    values = torch.randn(TOKENS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    return 0.3 * values * torch.logspace(-0.3, 0.3, COLUMNS) + values[:, :1]


def collected(wanted: Wanted, tap: Tap, workers: Workers):
    found = collector(wanted, COLUMNS, torch.device("cpu"))
    add_tap(found, wanted, 0, tap, workers)
    return found


def plans(recipe, *names: str) -> dict:
    return {name: plan_for(recipe, name) for name in names}


def test_what_is_stored_is_what_the_block_computes_with(workers):
    recipe = small_recipe(weights=GROUPS, rounding={"method": "gptq"}, transforms=[{"method": "hadamard"}])
    signs = pack_signs((torch.arange(COLUMNS) % 3 == 0).numpy())
    wanted = Wanted(hessians=("a",), signs=signs)
    statistics = collected(wanted, Tap(inputs(), None, TOKENS), workers)
    weights = {"a": gaussian(24, COLUMNS), "b": gaussian(8, COLUMNS, 1)}
    before = {name: weight.clone() for name, weight in weights.items()}
    first, second = round_linears(weights, plans(recipe, "a", "b"), statistics, workers, signs)
    for linear in (first, second):
        # Rotated inputs times stored weights are inputs times decoded ones: float32 rounding of 32 terms.
        stored = rotate(inputs(), signs) @ decode(linear.weight).T
        assert torch.allclose(stored, inputs() @ linear.decoded.T, atol=1e-4 * float(stored.abs().max()))
        change = (linear.decoded - before[linear.name]).double()
        hessian = inputs().double().T @ inputs().double()
        hessian += recipe.rounding.damping * hessian.diagonal().mean() * torch.eye(COLUMNS)  # no rotation changes this
        assert linear.loss == pytest.approx(float((change @ hessian @ change.T).trace()), rel=1e-3)
        assert 0 < linear.relative_loss < 1
        assert linear.bits_per_weight == 8 * (linear.weight.stored_bytes + 4) / linear.decoded.numel()
    assert (first.input_signs is signs, first.input_scale) == (True, None)


def test_inputs_that_overflow_are_refused_by_the_linear_that_reads_them(workers):
    recipe = small_recipe(weights=GROUPS, rounding={"method": "gptq"})
    statistics = collected(Wanted(hessians=("a",)), Tap(inputs() * 1e30, None, TOKENS), workers)
    with pytest.raises(UserError, match=r"layers\.3\.a: what calibration counts of a linear's inputs is not finite"):
        round_linears({"a": gaussian(24, COLUMNS)}, plans(recipe, "a"), statistics, workers, prefix="layers.3.")


def test_each_linear_is_rounded_as_its_plan_says(workers):
    recipe = small_recipe(
        weights=GROUPS, rounding={"method": "gptq"}, overrides=[{"pattern": "near", "rounding": {"method": "nearest"}}]
    )
    weight = gaussian(16, COLUMNS)
    results = {}
    for name in ("near", "fed"):
        statistics = collected(Wanted(hessians=(name,)), Tap(inputs(), None, TOKENS), workers)
        (linear,) = round_linears({name: weight.clone()}, plans(recipe, name), statistics, workers)
        change = (linear.decoded - weight).double()
        results[name] = float((change @ (inputs().double().T @ inputs().double()) @ change.T).trace())
    assert results["fed"] < 0.8 * results["near"], "feedback pays where inputs are alike"


def test_static_activations_have_the_scale_of_what_was_seen(workers):
    recipe = small_recipe(weights=INT8, activations={"mode": "static"})
    statistics = collected(Wanted(histogram=True), Tap(inputs(), None, TOKENS), workers)
    (linear,) = round_linears({"a": gaussian(8, COLUMNS)}, plans(recipe, "a"), statistics, workers)
    assert linear.input_scale == pytest.approx(float(inputs().abs().max()) * 2 / 255, rel=1e-3)
    assert linear.packed.activations == "static"


def test_statistics_of_an_expert_count_the_tokens_that_met_it(workers):
    met = torch.tensor([3, 10, 11, 40])
    weights = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1))
    wanted = Wanted(hessians=("e",), token_weights={"e": weights}, loss_scales={"e": 0.25})
    statistics = collected(wanted, Tap(inputs()[met], met, TOKENS), workers).by_linear["e"]
    assert (statistics.tokens, statistics.loss_scale) == (4, 0.25)
    rows = inputs()[met] * weights[met].sqrt()[:, None]
    assert torch.allclose(statistics.take_hessian().triu(), (rows.T @ rows).triu(), rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError, match="used once"):
        statistics.take_hessian()


def test_an_expert_that_nobody_met_rounds_to_nearest(workers):
    recipe = small_recipe(weights=GROUPS, rounding={"method": "gptq"})
    none = Tap(torch.empty(0, COLUMNS), torch.empty(0, dtype=torch.int64), TOKENS)
    weight = gaussian(8, COLUMNS)
    found = []
    for rounding in ("gptq", "nearest"):
        chosen = small_recipe(weights={**GROUPS, "observer": "min_max"}, rounding={"method": rounding})
        statistics = collected(Wanted(hessians=("e",) if rounding == "gptq" else ()), none, workers)
        found += round_linears({"e": weight.clone()}, plans(chosen, "e"), statistics, workers)
    assert torch.equal(found[0].decoded, found[1].decoded)
    assert recipe.rounding.method == "gptq"


class Coarse(Encoder):
    """Whole numbers, three columns at a time, each on its own: what is joint is the call alone."""

    width = 3

    def round(self, first, values):
        assert 1 <= len(values) <= self.width
        return values.round()

    def parts(self):
        return {}


@pytest.mark.parametrize("block_size", [6, 7, 128])
def test_columns_coded_jointly_count_their_loss_as_it_is(block_size):
    """tr(E H E^T) of the result; any other accounting of the feedback among the columns of a tuple would differ."""
    hessian = (inputs().T @ inputs()).contiguous()
    factor = factorize(hessian.clone(), 1e-6, False, Workers(1))
    weight = 3 * gaussian(20, COLUMNS)
    decoded, loss = Gptq(Rounding(block_size=block_size))._feed_forward(weight, Coarse(), factor)
    assert torch.equal(decoded, decoded.round())
    change = (weight - decoded).double()
    damped = hessian.double() + 1e-6 * hessian.diagonal().double().mean() * torch.eye(COLUMNS)
    assert loss == pytest.approx(float((change @ damped @ change.T).trace()), rel=1e-3)
    plain = (weight - weight.round()).double()
    assert loss < 0.8 * float((plain @ damped @ plain.T).trace()), "feedback reaches the tuples behind"


def test_stages_hold_the_experts_of_one_role_together():
    def linear(name, role, group, expert=None):
        return LinearSpec(name, (4, 4), role, group, expert)

    block = BlockSpec(
        0,
        "model.layers.0.",
        (
            linear("q", "query", "in"),
            linear("o", "output", "out"),
            *(linear(f"e{e}.up", "up", f"e{e} in", e) for e in range(3)),
            *(linear(f"e{e}.down", "down", f"e{e} out", e) for e in range(3)),
        ),
    )
    stages = [[name for group in stage for name in group.linears] for stage in block.stages]
    assert stages == [["q"], ["o"], ["e0.up", "e1.up", "e2.up"], ["e0.down", "e1.down", "e2.down"]]
    assert block.sources_of("q.weight") == (Source("model.layers.0.q.weight"),)


def test_parameters_are_joined_from_where_they_lie():
    stored = {"stack": torch.arange(24.0).view(2, 4, 3), "more": torch.ones(1, 3), "plain": torch.zeros(2)}
    reads = []

    def read(name):
        reads.append(name)
        return stored[name]

    joined = parameter_reader(read)
    assert joined((Source("plain"),)) is stored["plain"]
    assert torch.equal(joined((Source("stack", 1, (1, 3)),)), stored["stack"][1, 1:3])
    assert torch.equal(joined((Source("stack", 0),)), stored["stack"][0])
    assert reads == ["plain", "stack"], "the linears of a stack read it once"
    both = joined((Source("stack", 0, (0, 1)), Source("more")))
    assert torch.equal(both, torch.cat([stored["stack"][0, :1], stored["more"]]))


def test_who_is_routed_is_heard_inside_alone():
    assert routed_tokens() is None
    with routed_to(torch.tensor([1])):
        with routed_to(torch.tensor([2])):
            assert routed_tokens().tolist() == [2]
        assert routed_tokens().tolist() == [1]
    assert routed_tokens() is None

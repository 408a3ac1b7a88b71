"""The mathematics of training: the paper's gradients, the divergence's own, and one block's against plain autograd."""

import pytest
import torch
from schemes import gaussian, make_codec
from tiny_model import random_weights, tiny_config
from torch.nn import functional

from quern.architectures.base import architecture_of
from quern.codecs.trainable.grids import learned_step
from quern.core.machine.parallel import deterministic_workers
from quern.engines._modules import QuantizedLinear
from quern.quantization.training.adam import Adam
from quern.quantization.training.distillation import Heads
from quern.quantization.training.inputs import InputRounding
from quern.quantization.training.loop import BATCH, Data, History, Loop, Settings
from quern.quantization.training.model import Student
from quern.quantization.training.student import StudentBlock, TrainedVector, TrainedWeight
from quern.rotation.rotation import rotate

SCHEME = {"codec": "integer", "bits": 2, "symmetric": True, "granularity": "group", "group_size": 32}
TIME = 12


def test_learned_steps_have_the_gradients_of_the_paper():
    """Equations 3 and 5 with Qn = 2, Qp = 1, s = .5: latent -2, -.6, .3, .2, .9 lie at -4, -1.2, .6, .4, 1.8 steps."""
    latent = torch.tensor([[-2.0, -0.6, 0.3, 0.2, 0.9]], requires_grad=True)
    scale = torch.tensor([[0.5]], requires_grad=True)
    levels = torch.tensor([[-2.0, -1.0, 1.0, 0.0, 1.0]])
    values = learned_step(latent, scale, levels * 0.5, torch.tensor([[-2.0]]), torch.tensor([[1.0]]))
    assert torch.equal(values, levels * 0.5)
    upstream = torch.tensor([[1.0, 10.0, 100.0, 1000.0, 10000.0]])
    (values * upstream).sum().backward()
    assert latent.grad.tolist() == [[0, 10, 100, 1000, 0]]
    by_scale = torch.tensor([[-2.0, -1 + 1.2, 1 - 0.6, 0 - 0.4, 1.0]])
    torch.testing.assert_close(scale.grad, (by_scale * upstream).sum()[None, None])


def test_scales_of_groups_get_the_gradients_of_their_own_weights():
    codec, weight = make_codec(SCHEME), gaussian(4, 80)
    encoder = codec.encoder(weight, weight, refit=False)
    encoder.round_all(weight)
    trainable = codec.trainable((4, 80), encoder.parts(), weight)
    upstream = torch.zeros(4, 80)
    upstream[2, 64:] = 1.0
    (trainable.values() * upstream).sum().backward()
    places = trainable.factor.grad.nonzero().tolist()
    assert places == [[2, 2]]


def test_vectors_move_in_units_of_themselves_and_are_stored_as_they_came():
    stored = torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16)
    vector = TrainedVector(stored)
    assert torch.equal(vector.stored(), stored)
    vector.offset.data[0] = 0.5
    assert vector.stored().dtype == torch.bfloat16
    assert torch.equal(vector.values().detach(), vector.stored().float())
    vector.values().sum().backward()
    torch.testing.assert_close(vector.offset.grad, torch.full((3,), float(stored.float().square().mean().sqrt())))


@pytest.fixture(scope="module")
def model():
    config = tiny_config(num_hidden_layers=2, torch_dtype="float32")
    return architecture_of(config), random_weights(config)


def make_student(model, workers, latent, rotated=False):
    """Blocks whose linears are rounded to nearest, with the unquantized embedding as both heads."""
    architecture, weights = model
    codec, blocks = make_codec(SCHEME), []
    for spec in architecture.blocks:
        trained = {}
        for linear in spec.linears:
            weight = weights[f"{spec.prefix}{linear.name}.weight"]
            signs = None
            if rotated:
                signs = torch.arange(-(-linear.shape[1] // 8)).mul(37).to(torch.uint8)
                weight = rotate(weight, signs)
            encoder = codec.encoder(weight, weight, refit=False)
            encoder.round_all(weight)
            own = codec.trainable(linear.shape, encoder.parts(), weight if latent else None)
            trained[linear.name] = TrainedWeight(own, signs)
        blocks.append(StudentBlock(architecture, spec.index, trained, weights.__getitem__, torch.float32, TIME))
    head, norm = weights["model.embed_tokens.weight"], weights["model.norm.weight"]
    return Student(blocks, Heads(architecture.build_norm, norm, head, norm, head), lambda ids: head[ids], workers)


def sequences(count):
    ids = torch.randint(0, 300, (count, TIME), generator=torch.Generator().manual_seed(count))
    return ids, torch.randn(count, TIME, 64, generator=torch.Generator().manual_seed(7))


def whole_graph(student, ids, teacher):
    """The same loss by one graph through everything."""
    total = torch.zeros(())
    opened = [block._open(student._workers, True) for block in student.blocks]
    norm = student.heads.open()
    for sequence, known in zip(ids, teacher, strict=True):
        hidden = student._embed(sequence)[None]
        for block in student.blocks:
            hidden = block.run(hidden)
        wanted = functional.linear(student.heads._teacher(known), student.heads._teacher_head).log_softmax(-1)
        found = functional.linear(norm(hidden[0]), student.heads._student_head).log_softmax(-1)
        total = total + functional.kl_div(found, wanted, log_target=True, reduction="sum")
    return total / ids.numel(), opened, norm


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_gradients_are_those_of_one_graph_through_everything(model, latent, rotated):
    ids, teacher = sequences(3)
    with deterministic_workers(2) as workers:
        student = make_student(model, workers, latent, rotated)
        loss, opened, norm = whole_graph(student, ids, teacher)
        leaves = [leaf for one in opened for leaf in one.all()]
        expected = list(torch.autograd.grad(loss, [*leaves, norm.get_parameter("weight")]))
        assert student.backward(list(ids), list(teacher)) == pytest.approx(loss.item(), rel=1e-5)
        assert sum(student.divergences(list(ids), list(teacher))) / ids.numel() == pytest.approx(loss.item(), rel=1e-5)
        unit = student.heads.norm._unit
        torch.testing.assert_close(student.heads.norm.offset.grad, expected.pop() * unit, rtol=1e-3, atol=1e-6)
        for block, one in zip(student.blocks, opened, strict=True):
            for name in one.weights:
                weight, gradient = block.weights[name], expected.pop(0)
                if latent:
                    fresh = [parameter.grad.clone() for parameter in weight.trainable.parameters()]
                    weight.trainable.zero_grad()
                    weight.trainable.values().backward(weight.stored_gradient(gradient))
                    for found, wanted in zip(fresh, weight.trainable.parameters(), strict=True):
                        torch.testing.assert_close(found, wanted.grad, rtol=1e-3, atol=1e-5)
                else:
                    torch.testing.assert_close(weight.trainable.factor.grad, gradient, rtol=1e-3, atol=1e-5)
            for name in one.vectors:
                vector, gradient = block.vectors[name], expected.pop(0)
                torch.testing.assert_close(vector.offset.grad, gradient * vector._unit, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("rotated", [False, True])
def test_rounded_inputs_are_what_an_engine_multiplies(mode, rotated):
    scheme = {"codec": "integer", "bits": 8, "symmetric": True, "granularity": "channel"}
    codec, weight = make_codec(scheme), gaussian(16, 32)
    encoder = codec.encoder(weight, weight, refit=False)
    values = encoder.round_all(weight)
    inputs = gaussian(5, 32, seed=2)
    linear = QuantizedLinear(codec.scheme, (16, 32), False, torch.float32, mode, rotated)
    for name, part in encoder.parts().items():
        setattr(linear, name, part)
    signs = torch.tensor([1, 2, 3, 4], dtype=torch.uint8) if rotated else None
    if rotated:
        linear.input_signs = signs
    if mode == "static":
        linear.input_scale = torch.tensor(0.02)
    rounding = InputRounding(mode, 0.02 if mode == "static" else None, None, signs)
    effective = TrainedWeight(None, signs).effective(values)
    torch.testing.assert_close(functional.linear(rounding(inputs), effective), linear(inputs), rtol=1e-4, atol=1e-4)
    leaf = inputs.clone().requires_grad_()
    rounding(leaf).sum().backward()
    assert torch.equal(leaf.grad, torch.ones(5, 32))


def test_adam_takes_the_first_step_as_long_as_the_rate():
    parameter = torch.nn.Parameter(torch.zeros(3))
    with deterministic_workers(1) as workers:
        adam = Adam({"p": parameter}, workers)
        parameter.grad = torch.tensor([1e-6, -5.0, 0.0])
        adam.step(1, lambda name: 0.1)
    torch.testing.assert_close(parameter.data, torch.tensor([-0.1, 0.1, 0.0]))


class Keeping:
    """Every state, in memory."""

    def __init__(self):
        self.states = []

    def keep(self, history, best, state):
        self.states.append((history.step, best, {name: tensor.clone() for name, tensor in state().items()}))


class Quiet:
    """Progress that nobody sees."""

    lines: list[str] = []

    def task(self, *given):
        return self

    def advance(self, steps=1):
        pass

    def done(self):
        pass

    def log(self, message):
        self.lines.append(message)


def run_loop(model, threads=1, rate=2e-3, history=None, state=None, teacher=None):
    ids, _ = sequences(2 * BATCH + 2)
    with deterministic_workers(threads) as workers:
        exact = make_student(model, workers, latent=False)
        hidden = [exact._embed(sequence) for sequence in ids] if teacher is None else teacher
        loop = Loop(
            make_student(model, workers, latent=True),
            Data(ids, 2, hidden.__getitem__),
            Settings("codes", 3, rate, 0),
            workers,
            history or History(),
        )
        if state is not None:
            loop.load_state(state)
        keeping = Keeping()
        loop.run(keeping, Quiet())
        return loop, keeping


def test_a_loop_continues_from_any_state_with_the_same_bytes_at_any_number_of_threads(model, monkeypatch):
    monkeypatch.setattr("quern.quantization.training.loop.PATIENCE", 100)
    whole, keeping = run_loop(model)
    assert whole.history.step == 6
    step, _, state = keeping.states[3]
    losses = whole.history.losses[:step]
    before = History(step, [entry for entry in whole.history.heldout if entry[0] <= step], losses)
    again, _ = run_loop(model, threads=3, history=before, state=state)
    assert again.history == whole.history
    last, other = whole.state(), again.state()
    assert all(torch.equal(last[name], other[name]) for name in last)


def test_a_loss_that_grows_or_is_no_number_ends_training_with_the_best_state_kept(model):
    ids, _ = sequences(2 * BATCH + 2)
    with deterministic_workers(1) as workers:  # a teacher that the student nearly agrees with: steps lead away
        teacher = make_student(model, workers, latent=False)._forward(list(ids))[-1]
    for number, hidden in enumerate(teacher):
        hidden += 0.01 * gaussian(TIME, 64, seed=number)
    wild, keeping = run_loop(model, rate=0.1, teacher=teacher)
    assert wild.history.problem is not None
    assert wild.history.best[0] == 0
    assert [step for step, best, _ in keeping.states if best] == [0]
    broken = [torch.zeros(TIME, 64) for _ in ids]
    for hidden in broken[:-2]:
        hidden += torch.nan
    stopped, _ = run_loop(model, teacher=broken)
    assert "step 1" in stopped.history.problem
    assert stopped.history.best[0] == 0

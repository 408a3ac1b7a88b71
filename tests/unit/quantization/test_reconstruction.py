"""Tuning one block: the loss falls on sequences that it never saw, or nothing is changed; weights count; the same bytes anywhere."""

import math

import pytest
import torch
from schemes import make_codec
from tiny_model import random_weights, tiny_config
from torch.nn import functional

from quern.architectures.base import architecture_of
from quern.core.errors import UserError
from quern.core.machine.parallel import deterministic_workers
from quern.quantization.calibration.block import Block
from quern.quantization.training.reconstruction import Reconstruction, Streams
from quern.quantization.training.student import StudentBlock, TrainedWeight

SCHEMES = {
    "grid": {"codec": "integer", "bits": 2, "symmetric": True, "granularity": "group", "group_size": 32},
    "trellis": {"codec": "trellis", "bits": 2},
    "tables": {"codec": "kmeans", "bits": 2},
}
TIME, COUNT, HELD = 16, 24, (7, 15, 23)


@pytest.fixture(scope="module")
def model():
    config = tiny_config(num_hidden_layers=1, torch_dtype="float32", initializer_range=0.1)
    return architecture_of(config), random_weights(config)


def student_of(model, latent=True, scheme="grid"):
    """Its linears rounded to nearest."""
    architecture, weights = model
    codec, trained = make_codec(SCHEMES[scheme]), {}
    for linear in architecture.block(0).linears:
        weight = weights[f"model.layers.0.{linear.name}.weight"]
        encoder = codec.encoder(weight, weight, refit=False)
        encoder.round_all(weight)
        parts = codec.join([encoder.parts()])
        trained[linear.name] = TrainedWeight(codec.trainable(linear.shape, parts, weight if latent else None))
    return StudentBlock(architecture, 0, trained, weights.__getitem__, torch.float32, TIME)


def streams_of(model, weights=None, spoiled=None):
    """Inputs that go together, as those of models do, and what the unquantized block makes of them; targets of the ``spoiled``
    places are no numbers."""
    architecture, tensors = model
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(COUNT, TIME, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    targets = Block(architecture, 0, tensors.__getitem__, torch.float32, TIME).run(inputs).detach()
    if spoiled is not None:
        targets[spoiled] = torch.nan
    return Streams(
        inputs=lambda place: inputs[place],
        targets=lambda place: targets[place],
        weights=torch.ones(COUNT, TIME) if weights is None else weights,
        held=HELD,
    )


def tune(block, streams, threads=1, passes=4, rate=2e-3):
    with deterministic_workers(threads) as workers:
        return Reconstruction(block, streams, passes, rate, 0, workers).run(lambda: None)


def loss_of(block, streams, places):
    """As the module says it, in one expression."""
    with deterministic_workers(1) as workers:
        outputs = torch.stack(block.outputs([streams.inputs(place) for place in places], workers))
    targets = torch.stack([streams.targets(place) for place in places])
    weights = streams.weights[list(places)][..., None]
    return float((weights * (outputs - targets) ** 2).sum() / (weights * targets**2).sum())


@pytest.mark.parametrize("latent", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_loss_falls_on_sequences_that_are_not_trained_on(model, scheme, latent):
    streams = streams_of(model)
    block = student_of(model, latent, scheme)
    before = loss_of(block, streams, HELD)
    found = tune(block, streams)
    assert found.before == pytest.approx(before, rel=1e-5)
    assert found.after < 0.97 * found.before
    assert found.problem is None
    assert 0 < found.best_step <= found.steps


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_handed_out_is_the_best_state_bit_for_bit(model, scheme):
    """A block of the parts and vectors that came out has the loss that was told."""
    architecture, weights = model
    streams = streams_of(model)
    found = tune(student_of(model, scheme=scheme), streams)
    codec = make_codec(SCHEMES[scheme])
    shapes = {linear.name: linear.shape for linear in architecture.block(0).linears}
    stored = {n: TrainedWeight(codec.trainable(shapes[n], parts, None)) for n, parts in found.parts.items()}
    known = {**weights, **{f"model.layers.0.{name}": vector for name, vector in found.vectors.items()}}
    assert found.vectors.keys() >= {"input_layernorm.weight", "self_attn.q_proj.bias"}
    again = StudentBlock(architecture, 0, stored, known.__getitem__, torch.float32, TIME)
    assert loss_of(again, streams, HELD) == pytest.approx(found.after, rel=1e-6)


def test_the_gradient_is_that_of_the_loss(model):
    """Of one step's batch, against one graph through the decoded weights."""
    architecture, weights = model
    streams = streams_of(model, torch.rand(COUNT, TIME, generator=torch.Generator().manual_seed(3)))
    block = student_of(model)
    with deterministic_workers(2) as workers:
        loop = Reconstruction(block, streams, 1, 1e-9, 0, workers)
        places, steps = loop._batch(0), []
        loop._adam.step = lambda number, rate: steps.append(number)
        told = loop._step(0)
    assert steps == [1]
    plain = Block(architecture, 0, weights.__getitem__, torch.float32, TIME)
    name = "mlp.down_proj"
    for linear in architecture.block(0).linears:
        values = block.weights[linear.name].trainable.values().detach()
        plain.linear(linear.name).weight = torch.nn.Parameter(values)
    outputs = torch.cat([plain.run(streams.inputs(place)[None]) for place in places])
    targets = torch.stack([streams.targets(place) for place in places])
    counts = streams.weights[places][..., None]
    loss = (counts * (outputs - targets) ** 2).sum() / (counts * targets**2).sum()
    assert told == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    expected = plain.linear(name).weight.grad
    trainable = block.weights[name].trainable
    found = trainable.latent.grad.clone()
    trainable.zero_grad()
    trainable.values().backward(expected)
    torch.testing.assert_close(found, trainable.latent.grad, rtol=1e-3, atol=1e-7)


def test_tokens_that_count_for_nothing_change_nothing(model):
    weights = torch.ones(COUNT, TIME)
    weights[:, :3] = 0
    one = tune(student_of(model), streams_of(model, weights))
    streams = streams_of(model, weights)
    shifted = Streams(
        streams.inputs,
        lambda place: streams.targets(place) + functional.pad(torch.full((3, 64), 1e3), (0, 0, 0, TIME - 3)),
        weights,
        HELD,
    )
    other = tune(student_of(model), shifted)
    assert one.after == other.after
    assert all(torch.equal(one.parts[n][k], other.parts[n][k]) for n in one.parts for k in one.parts[n])


def test_any_number_of_threads_gives_the_same_bytes(model):
    one, three = (tune(student_of(model), streams_of(model), threads) for threads in (1, 3))
    assert (one.before, one.after, one.best_step) == (three.before, three.after, three.best_step)
    assert all(torch.equal(one.parts[n][k], three.parts[n][k]) for n in one.parts for k in one.parts[n])
    assert all(torch.equal(one.vectors[n], three.vectors[n]) for n in one.vectors)


def test_steps_that_lead_away_end_it_and_leave_the_block_as_it_was(model):
    found = tune(student_of(model), streams_of(model), rate=0.9)
    assert found.problem is not None
    assert "after step" in found.problem
    assert found.best_step == 0
    assert found.after == found.before
    assert not found.parts
    assert not found.vectors


def test_a_loss_that_is_no_number_ends_it(model):
    trained = [place for place in range(COUNT) if place not in HELD]
    found = tune(student_of(model), streams_of(model, spoiled=trained))
    assert found.problem == "in step 1 the loss was no number"
    assert math.isfinite(found.after)
    assert not found.parts


def test_a_loss_that_is_no_number_from_the_beginning_is_refused(model):
    with pytest.raises(UserError, match=r"block 0: the error of its outputs, by which tuning goes, is not finite"):
        tune(student_of(model), streams_of(model, spoiled=list(HELD)))

"""What every codec promises of what can be trained of a stored matrix: the very values that its parts decode to, and no other
byte; for every scheme that it can store."""

import math

import pytest
import torch
from schemes import ALL, gaussian, make_codec, scheme_id

from quern.codecs.trainable.base import LATENT, Fixed

SHAPES = ((33, 100), (17, 33))
every_scheme = pytest.mark.parametrize("scheme", ALL, ids=scheme_id)


def stored(scheme, shape, seed=0):
    codec, weight = make_codec(scheme), gaussian(*shape, seed=seed)
    encoder = codec.encoder(weight, weight, refit=False)
    encoder.round_all(weight)
    return codec, codec.join([encoder.parts()])


def trainables(scheme):
    """Without and, where the codec takes them, with latent weights, which begin somewhere near."""
    for shape in SHAPES:
        codec, parts = stored(scheme, shape)
        generator = torch.Generator().manual_seed(3)
        near = gaussian(*shape) * (1 + 0.1 * torch.randn(shape, generator=generator))
        for weight in [None, near] if codec.trains_codes else [None]:
            yield codec, shape, parts, codec.trainable(shape, parts, weight)


def assert_true_to_its_parts(codec, shape, trainable):
    parts = trainable.parts()
    assert {name: (tuple(part.shape), part.dtype) for name, part in parts.items()} == codec.part_shapes(shape)
    assert torch.equal(trainable.values(), codec.decode(shape, parts))


@every_scheme
def test_it_begins_at_what_is_stored(scheme):
    for codec, shape, parts, trainable in trainables(scheme):
        assert_true_to_its_parts(codec, shape, trainable)
        assert torch.equal(trainable.values(), codec.decode(shape, parts))


@every_scheme
def test_values_are_what_parts_decode_to_wherever_training_goes(scheme):
    for codec, shape, parts, trainable in trainables(scheme):
        generator = torch.Generator().manual_seed(4)
        for name, parameter in trainable.named_parameters():
            size = 0.4 if name.endswith(LATENT) else 0.05
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
        trainable.encode_again()
        assert_true_to_its_parts(codec, shape, trainable)
        if not isinstance(trainable, Fixed):
            assert not torch.equal(trainable.values(), codec.decode(shape, parts))


@every_scheme
def test_gradients_reach_every_parameter(scheme):
    for _, shape, _, trainable in trainables(scheme):
        values = trainable.values()
        if isinstance(trainable, Fixed):
            assert not values.requires_grad
            continue
        (values * gaussian(*shape, seed=1)).sum().backward()
        for name, parameter in trainable.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name
            assert bool(parameter.grad.any()), name


@every_scheme
def test_gradients_of_rows_are_those_of_values(scheme):
    """d/d(log of a row's factor) = sum of d/d(value) x value over the row."""
    for _, shape, _, trainable in trainables(scheme):
        if not trainable.by_rows or isinstance(trainable, Fixed):
            continue
        upstream = gaussian(*shape, seed=1)
        (trainable.values() * upstream).sum().backward()
        expected = trainable.factor.grad.clone()
        trainable.take_row_gradient((upstream * trainable.values().detach()).sum(1))
        torch.testing.assert_close(trainable.factor.grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@every_scheme
def test_a_state_is_taken_up_where_it_was_left(scheme):
    for codec, shape, parts, trainable in trainables(scheme):
        for parameter in trainable.parameters():
            parameter.data += 0.03
        trainable.encode_again()
        weight = gaussian(*shape) if hasattr(trainable, LATENT) and trainable.latent is not None else None
        again = codec.trainable(shape, parts, weight)
        again.load_state_dict(trainable.state_dict())
        assert torch.equal(again.values(), trainable.values())
        assert all(
            torch.equal(p.float(), q.float())
            for p, q in zip(again.parts().values(), trainable.parts().values(), strict=True)
        )


@every_scheme
def test_steps_towards_a_target_come_nearer_to_it(scheme):
    """A toy: the squared distance to rows that are about a fifth larger than those that were stored."""
    shape, rate = (33, 100), 0.02
    codec, parts = stored(scheme, shape)
    target = gaussian(*shape) * torch.linspace(1.15, 1.25, shape[0])[:, None]
    for weight in [None, codec.decode(shape, parts)] if codec.trains_codes else [None]:
        trainable = codec.trainable(shape, parts, weight)
        if isinstance(trainable, Fixed):
            continue
        losses = []
        optimizer = torch.optim.Adam(trainable.parameters(), rate)
        for _ in range(30):
            loss = (trainable.values() - target).square().mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trainable.encode_again()
        losses.append((trainable.values() - target).square().mean().item())
        assert all(math.isfinite(loss) for loss in losses)
        assert min(losses[1:]) < losses[0]

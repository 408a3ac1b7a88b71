"""Whole numbers of ggml's sub-blocks one up or down under the full Hessian: the best neighbour, and what is stored of it."""

import pytest
import torch
from schemes import gaussian, make_codec

from quern.codecs.base import decode
from quern.core.machine.parallel import Workers
from quern.core.recipe_parts import Rounding as Settings
from quern.quantization.rounding.factor import factorize
from quern.quantization.rounding.gptq import Gptq
from quern.quantization.rounding.sweeps import _stepped

TYPES = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"]
ROWS, COLUMNS = 12, 256


def hessian():
    mix = torch.eye(COLUMNS) + gaussian(COLUMNS, COLUMNS, 7) / COLUMNS**0.5
    inputs = gaussian(4 * COLUMNS, COLUMNS, 8) @ mix * torch.logspace(-0.5, 0.5, COLUMNS)
    return inputs.T @ inputs


def rounded_by(kind):
    codec, weight = make_codec({"codec": "ggml", "type": kind}), gaussian(ROWS, COLUMNS)
    encoder = codec.encoder(weight, weight, refit=False)
    return codec, encoder, weight, encoder.round_all(weight)


def stored(codec, encoder):
    return codec.decode((ROWS, COLUMNS), encoder.parts())


@pytest.mark.parametrize("kind", TYPES)
def test_what_is_adopted_is_what_was_offered(kind):
    codec, encoder, _, _ = rounded_by(kind)
    width = encoder.step_width
    offered, before = encoder.neighbours(2 * width), stored(codec, encoder)
    assert offered.shape == (len(offered), width, ROWS)
    choice = torch.arange(ROWS) % (len(offered) + 1) - 1
    encoder.adopt(2 * width, choice)
    after = stored(codec, encoder)
    here = slice(2 * width, 3 * width)
    for row, chosen in enumerate(choice.tolist()):
        expected = before[row, here] if chosen < 0 else offered[chosen, :, row]
        assert torch.equal(after[row, here], expected)
    outside = torch.ones(COLUMNS, dtype=torch.bool)
    outside[here] = False
    assert torch.equal(after[:, outside], before[:, outside])


@pytest.mark.parametrize("kind", TYPES)
def test_the_neighbour_of_least_loss_is_taken(kind):
    """Against the loss of the whole row, written out in float64."""
    codec, encoder, weight, start = rounded_by(kind)
    plain, width = hessian(), encoder.step_width
    here = slice(width, 2 * width)

    def losses(values):
        change = (values - weight).double()
        return (change @ plain.double() * change).sum(1)

    tried = [losses(start)]
    for offer in encoder.neighbours(width):
        other = start.clone()
        other[:, here] = offer.T
        tried.append(losses(other))
    least = torch.stack(tried).min(0).values
    residual = plain @ (start - weight).T
    moved = _stepped(start.T[here], residual[here], encoder, plain[here, here], width)
    found = stored(codec, encoder)
    assert torch.allclose(  # the difference is added in float32
        found[:, here], (start.T[here] + moved).T, rtol=0, atol=1e-6
    )
    assert torch.allclose(losses(found), least, rtol=1e-5, atol=0)
    assert (losses(found) < losses(start)).any()


@pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q4_k"])
def test_a_sweep_with_them_loses_less(kind, monkeypatch):
    """Of types with fewer levels, where a whole number is worth more."""
    codec, weight = make_codec({"codec": "ggml", "type": kind}), gaussian(8 * ROWS, COLUMNS)

    def loss():
        factor = factorize(hessian(), 0.01, False, Workers(1), keep=True)
        found = Gptq(Settings(sweeps=2)).round(weight, codec, factor, Workers(1))
        assert torch.equal(decode(found.weight), found.decoded)
        return found.loss

    own = type(codec.encoder(weight, weight, refit=False))
    initialize = own.__init__

    def without(self, *given):
        initialize(self, *given)
        self.step_width = None

    stepping = loss()
    with monkeypatch.context() as patched:
        patched.setattr(own, "__init__", without)
        assert stepping < loss()

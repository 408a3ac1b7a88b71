"""Products of half-precision matrices: with and without the processor's help they are the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from quern.core.machine import products


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without instructions, three slabs a matrix."""
    monkeypatch.setattr(products, "multiplies_half", lambda: False)
    monkeypatch.setattr(products, "SLAB_ENTRIES", 24 * 40)


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", products.HALF)
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_in_float64_rounded_once(dtype: torch.dtype, biased: bool) -> None:
    inputs, weight = numbers(2, 7, 40, dtype=dtype), numbers(60, 40, dtype=dtype)
    bias = numbers(60, dtype=dtype) if biased else None
    exact = functional.linear(inputs.double(), weight.double(), None if bias is None else bias.double())
    found = products.linear(inputs, weight, bias)
    assert found.dtype == dtype
    # A sum of 41 float32 numbers is off by 41 half units in the last place of the sum of their sizes at most; then one rounding.
    sizes = functional.linear(inputs.double().abs(), weight.double().abs())
    bound = 41 * 2**-24 * sizes + torch.finfo(dtype).eps / 2 * exact.abs() + 2**-20
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_gradients_are_those_in_float64(layout: str) -> None:
    inputs, bias = numbers(2, 7, 40), numbers(60)
    weight = numbers(60, 40) if layout == "rows" else numbers(40, 60).T
    into = numbers(2, 7, 60)
    leaves = [part.detach().clone().requires_grad_() for part in (inputs, weight, bias)]
    found = torch.autograd.grad(products.linear(*leaves), leaves, into)
    wide = [part.detach().double().requires_grad_() for part in (inputs, weight, bias)]
    exact = torch.autograd.grad(functional.linear(*wide), wide, into.double())
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=2**-8, atol=1e-4)


def test_only_wanted_gradients_are_made() -> None:
    inputs, weight = numbers(5, 40).requires_grad_(), numbers(60, 40)
    (found,) = torch.autograd.grad(products.linear(inputs, weight).float().sum(), [inputs])
    assert found.shape == inputs.shape


def test_a_model_keeps_its_weights_names_and_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 8)).to(torch.bfloat16)
    seen: list[int] = []
    model[0].register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    before, names = model(numbers(3, 40)), list(model.state_dict())
    products.use_products(model)
    assert list(model.state_dict()) == names
    assert isinstance(model[2], nn.Linear)
    torch.testing.assert_close(model(numbers(3, 40)), before, rtol=2**-6, atol=2**-7)
    assert seen == [3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_left_to_torch(dtype: torch.dtype) -> None:
    inputs, weight = numbers(3, 40, dtype=dtype), numbers(60, 40, dtype=dtype)
    assert torch.equal(products.linear(inputs, weight), functional.linear(inputs, weight))


def test_processors_with_instructions_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiplies_half", lambda: True)
    inputs, weight, bias = numbers(3, 40), numbers(60, 40), numbers(60)
    assert torch.equal(products.linear(inputs, weight, bias), functional.linear(inputs, weight, bias))


@pytest.mark.parametrize(
    ("machine", "capability", "expected"),
    [("x86_64", "AVX2", False), ("x86_64", "DEFAULT", False), ("x86_64", "AVX512", True), ("aarch64", "DEFAULT", True)],
)
def test_which_processors_are_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, machine: str, capability: str, expected: bool
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert products.multiplies_half.__wrapped__() is expected

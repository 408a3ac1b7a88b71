"""The rotation of inputs: orthogonal, its own inverse up to signs, and what a matrix of signs would do."""

import numpy as np
import pytest
import torch

from quern.rotation.rotation import block_size, hadamard, pack_signs, rotate, rotate_back, unpack_signs

SIZES = (1, 2, 3, 8, 12, 64, 96, 100, 231, 576)


def matrix(columns: int) -> np.ndarray:
    """Sylvester's Hadamard matrix in every diagonal block, float64."""
    size = columns & -columns
    block = np.array([[(-1) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]) / size**0.5
    return np.kron(np.eye(columns // size), block)


def values(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def signs_of(columns: int) -> torch.Tensor:
    return pack_signs(np.random.default_rng(columns).integers(0, 2, columns).astype(bool))


@pytest.mark.parametrize("columns", SIZES)
def test_it_is_the_matrix_of_signs(columns):
    """Butterflies add in log2(n) levels, each of which rounds once: the error is at most (levels + 2) eps times the size."""
    x, signs = values(5, columns), signs_of(columns)
    factors = unpack_signs(signs, columns).double().numpy()
    expected = (x.double().numpy() * factors) @ matrix(columns)
    bound = (block_size(columns).bit_length() + 2) * 2.0**-23 * np.abs(x.double().numpy()) @ np.abs(matrix(columns))
    found = rotate(x, signs)
    assert found.dtype == torch.float32
    assert bool((np.abs(found.double().numpy() - expected) <= bound).all())


@pytest.mark.parametrize("columns", SIZES)
def test_turning_back_is_the_inverse(columns):
    """Twice the levels of the test above, and one norm of a block per value."""
    x, signs = values(300, columns), signs_of(columns)  # more rows than are transformed at a time
    before = x.clone()
    again = rotate_back(rotate(x, signs), signs)
    assert torch.equal(x, before), "the input is not to be touched"
    bound = 2 * (block_size(columns).bit_length() + 2) * 2.0**-23 * x.norm(dim=1, keepdim=True)
    assert bool(((again - x).abs() <= bound).all())


def test_products_do_not_change():
    """(x R)(w R)^T = x w^T, to the rounding of 96 float32 terms on either side."""
    x, w, signs = values(7, 96, 1), values(5, 96, 2), signs_of(96)
    turned = rotate(x, signs).double() @ rotate(w, signs).double().T
    bound = 40 * 2.0**-24 * x.norm(dim=1).double()[:, None] * w.norm(dim=1).double()[None]
    assert bool(((turned - x.double() @ w.double().T).abs() <= bound).all())


def test_an_outlier_is_spread_over_its_block():
    x = torch.zeros(1, 192)
    x[0, 100] = 8
    turned = rotate(x, signs_of(192))
    assert torch.equal(turned.abs(), (torch.arange(192) // 64 == 1).float()[None])


def test_bit_of_a_sign():
    """Bit i % 8 of byte i // 8 set: column i is multiplied by -1 (as csrc/kernels/matmul.h has it)."""
    packed = pack_signs(np.array([True, False, False, False, False, False, False, False, False, True]))
    assert packed.tolist() == [1, 2]
    assert unpack_signs(packed, 10).tolist() == [-1, 1, 1, 1, 1, 1, 1, 1, 1, -1]


def test_any_number_of_dimensions_and_any_dtype():
    x, signs = values(6, 64), signs_of(64)
    assert torch.equal(rotate(x.view(2, 3, 64), signs), rotate(x, signs).view(2, 3, 64))
    assert torch.equal(rotate(x.bfloat16(), signs), rotate(x.bfloat16().float(), signs))
    assert rotate(x[:0], signs).shape == (0, 64)


def test_overwriting_is_confined_to_the_inner_function():
    x = values(3, 8)
    assert hadamard(x.clone()).shape == (3, 8)
    assert torch.equal(x, values(3, 8))


@pytest.mark.parametrize("columns", [*SIZES, 2, 32, 128, 512, 2048])
def test_the_kernel_adds_in_the_same_order(columns):
    """Gradients go through torch's additions, which are the same to the last bit."""
    x, signs = values(33, columns), signs_of(columns)
    for turn in (rotate, rotate_back):
        slow = turn(x.clone().requires_grad_(), signs)
        assert slow.requires_grad
        assert torch.equal(turn(x, signs), slow.detach())
        assert torch.equal(turn(x.T.contiguous().T, signs), slow.detach()), "whatever the strides"
        assert torch.equal(turn(x.bfloat16(), signs), turn(x.bfloat16().float(), signs))
    assert rotate(x[:0], signs).shape == (0, columns)

"""The reference engine's own arithmetic: products with packed weights, and rows of packed embeddings."""

import numpy as np
import pytest
import torch
from schemes import gaussian, make_codec
from torch.nn import functional

from quern.engines._modules import QuantizedEmbedding, QuantizedLinear, dynamic_scale


def linear(scheme: dict, rows: int, columns: int, activations: str, bias: bool) -> tuple[QuantizedLinear, torch.Tensor]:
    codec = make_codec(scheme)
    weight = gaussian(rows, columns)
    encoder = codec.encoder(weight, weight, refit=False)
    decoded = encoder.round_all(weight)
    module = QuantizedLinear(codec.scheme, (rows, columns), bias, torch.float32, activations)
    for name, part in codec.join([encoder.parts()]).items():
        getattr(module, name).copy_(part)
    if bias:
        module.bias.data = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    return module, decoded


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_only_linear_is_the_product_with_decoded_weights(bias, dtype):
    module, decoded = linear(
        {"codec": "integer", "bits": 3, "symmetric": False, "granularity": "group", "group_size": 32},
        40,
        100,
        "none",
        bias,
    )
    x = torch.randn(3, 5, 100, generator=torch.Generator().manual_seed(2)).to(dtype)
    module.bias = None if module.bias is None else torch.nn.Parameter(module.bias.to(dtype), requires_grad=False)
    assert torch.equal(module(x), functional.linear(x, decoded.to(dtype), module.bias))


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("tokens", [1, 16, 17, 33])
def test_int8_products_are_exact(mode, granularity, tokens):
    """The integers against numpy's int64; what follows is three float32 multiplications and an addition, in this order."""
    columns = 515
    module, _ = linear(
        {"codec": "integer", "bits": 8, "symmetric": True, "granularity": granularity}, 24, columns, mode, True
    )
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)) * 3
    x[0] = 0
    if mode == "static":
        module.input_scale.copy_(torch.tensor(0.03))
        scale = np.full((tokens, 1), np.float32(0.03))
    else:
        scale = np.maximum(np.abs(x.numpy()).max(1, keepdims=True) / np.float32(127.5), np.finfo(np.float32).tiny)
        assert np.array_equal(dynamic_scale(x).numpy(), scale)
    quantized = np.clip(np.rint(x.numpy() / scale), -128, 127).astype(np.int64)
    integers = quantized @ module.codes.numpy().astype(np.int64).T
    weight_scale = module.scale.float().numpy().reshape(1, -1)
    expected = integers.astype(np.float32) * scale * weight_scale + module.bias.numpy()
    assert np.array_equal(module(x).numpy(), expected)


GROUPS_OF_32 = {"bits": 4, "granularity": "group", "group_size": 32}


@pytest.mark.parametrize(
    ("scheme", "mode", "input_group"),
    [
        (GROUPS_OF_32, "dynamic", None),
        (GROUPS_OF_32, "dynamic", 32),
        (GROUPS_OF_32, "static", None),
        ({"bits": 4, "granularity": "channel"}, "dynamic", None),
        ({"bits": 4, "granularity": "channel"}, "dynamic", 48),
        ({"bits": 3, "granularity": "tensor"}, "dynamic", 7),
        ({"bits": 3, "granularity": "tensor"}, "static", None),
        ({"bits": 8, "granularity": "group", "group_size": 64}, "dynamic", None),
        ({"bits": 8, "granularity": "group", "group_size": 1000}, "dynamic", 1000),
    ],
)
def test_int8_products_of_groups_are_exact(scheme, mode, input_group):
    """The integers of each group against numpy's int64; then two float32 products, and a sum in the order of the groups."""
    columns, tokens = 515, 9
    codec = make_codec({"codec": "integer", "symmetric": True, **scheme})
    weight = gaussian(24, columns)
    encoder = codec.encoder(weight, weight, refit=False)
    decoded = encoder.round_all(weight)
    module = QuantizedLinear(codec.scheme, (24, columns), False, torch.float32, mode, False, input_group)
    for name, part in codec.join([encoder.parts()]).items():
        getattr(module, name).copy_(part)
    if mode == "static":
        module.input_scale.copy_(torch.tensor(0.03))
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(3))
    x[0] = 0
    weight_scale = module.scale.float().numpy()
    width = min(scheme.get("group_size", columns), columns)
    spread = np.broadcast_to(weight_scale.repeat(width, axis=1)[:, :columns], (24, columns))
    codes = np.rint(decoded.numpy() / spread).astype(np.int64)
    size = min(input_group or width, width)
    expected = np.zeros((tokens, 24), np.float32)
    for first in range(0, columns, size):
        part = slice(first, first + size)
        seen = x.numpy() if input_group is None else x.numpy()[:, part]
        largest = np.abs(seen).max(1, keepdims=True) / np.float32(127.5)
        scale = np.maximum(largest, np.finfo(np.float32).tiny) if mode == "dynamic" else np.float32(0.03)
        quantized = np.clip(np.rint(x.numpy()[:, part] / scale), -128, 127).astype(np.int64)
        integers = quantized @ codes[:, part].T
        expected += integers.astype(np.float32) * scale * spread[:, first]
    assert np.array_equal(module(x).numpy(), expected)


def test_the_largest_integer_product_does_not_overflow():
    """-128 x -128 over 16384 inputs is 2^28."""
    module, _ = linear(
        {"codec": "integer", "bits": 8, "symmetric": True, "granularity": "channel"}, 8, 16384, "static", False
    )
    module.codes.fill_(-128)
    module.scale.fill_(1.0)
    module.input_scale.copy_(torch.tensor(1.0))
    assert torch.equal(module(torch.full((20, 16384), -200.0)), torch.full((20, 8), 2.0**28))


def test_embedding_looks_rows_up():
    codec = make_codec({"codec": "integer", "bits": 5, "symmetric": False, "granularity": "group", "group_size": 32})
    weight = gaussian(50, 100)
    encoder = codec.encoder(weight, weight, refit=False)
    decoded = encoder.round_all(weight)
    module = QuantizedEmbedding(codec.scheme, (50, 100), torch.float32)
    for name, part in codec.join([encoder.parts()]).items():
        getattr(module, name).copy_(part)
    ids = torch.tensor([[3, 3, 49], [0, 7, 3]])
    assert torch.equal(module(ids), decoded[ids])


def test_casting_a_module_leaves_what_is_packed():
    module, _ = linear(
        {"codec": "integer", "bits": 4, "symmetric": False, "granularity": "group", "group_size": 32},
        8,
        64,
        "static",
        True,
    )
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.to(torch.float64)
    assert module.bias.dtype == torch.float64
    for name, buffer in module.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer.nan_to_num(), before[name].nan_to_num())

"""What every architecture declares, checked against transformers' own model of that family."""

from itertools import pairwise

import pytest
import torch
from tiny_model import ROUTED, block_weights, random_weights, tiny_config
from torch import nn

from quern.architectures.base import ARCHITECTURES, architecture_of
from quern.core.errors import UserError
from quern.quantization.calibration.block import Block

EXPECTED = {"llama", "mistral", "qwen2", "qwen3", *ROUTED}
KEPT = "shared_expert_gate"
"""A linear of one row, which no family declares, so that nothing quantizes it."""
TIME = 24
"""Tokens enough that each of four experts meets some."""
every_family = pytest.mark.parametrize("family", ARCHITECTURES.names())


def names_of(stage, expert):
    """Linears of a stage that a token meets on its way through ``expert``."""
    return {
        name for group in stage for name in group.linears if f".experts.{expert}." in name or ".experts." not in name
    }


def model_of(config: dict):
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in config.items() if key not in ("model_type", "torch_dtype")}
    # Expert by expert: grouped products add in another order.
    sparse = {"experts_implementation": "eager"} if config["model_type"] in ROUTED else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values), **sparse).eval()
    model.load_state_dict(random_weights(config), strict=False)
    return model


def test_the_promised_families_are_there():
    assert set(ARCHITECTURES.names()) >= EXPECTED


@every_family
def test_a_family_is_called_as_transformers_calls_it(family):
    assert ARCHITECTURES.get(family).model_type == family


@every_family
def test_every_linear_of_a_block_is_declared_once_with_a_role(family):
    architecture = architecture_of(tiny_config(family))
    with torch.device("meta"):
        block = architecture.build_block(0)
    linears = [
        name for name, module in block.named_modules() if isinstance(module, nn.Linear) and not name.endswith(KEPT)
    ]
    declared = [linear.name for linear in architecture.block(0).linears]
    assert sorted(declared) == sorted(linears)
    assert len(set(declared)) == len(declared)
    assert {linear.role for linear in architecture.block(0).linears} == {
        "query",
        "key",
        "value",
        "output",
        "gate",
        "up",
        "down",
    }


@every_family
@pytest.mark.parametrize("tied", [True, False])
def test_expected_tensors_are_those_of_a_real_model(family, tied):
    config = tiny_config(family, tie_word_embeddings=tied)
    state = model_of(config).state_dict()
    if tied:
        state.pop("lm_head.weight")
    architecture, shapes = architecture_of(config), {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert architecture.layout(shapes).shapes == shapes
    by_block = {name: tuple(tensor.shape) for name, tensor in block_weights(config).items()}
    assert architecture.expected_shapes() == architecture.layout(by_block).shapes == by_block


@every_family
def test_groups_read_the_same_tensor_in_the_declared_order(family):
    """The very same memory arrives at all linears of a group; different groups read different tensors."""
    architecture = architecture_of(tiny_config(family, num_hidden_layers=1))
    block = Block(architecture, 0, block_weights(tiny_config(family)).__getitem__, torch.float32, TIME)
    seen: dict[str, torch.Tensor] = {}

    def look(name):
        def hook(module, inputs):
            seen[name] = inputs[0]

        return hook

    for name in (linear.name for linear in architecture.block(0).linears):
        block.linear(name).register_forward_pre_hook(look(name))
    block.run(torch.randn(1, TIME, 64, generator=torch.Generator().manual_seed(0)))
    groups = [{seen[name].data_ptr() for name in group.linears} for group in architecture.block(0).groups]
    assert all(len(pointers) == 1 for pointers in groups)
    assert len(set.union(*groups)) == len(groups)
    order = [name for group in architecture.block(0).groups for name in group.linears]
    positions = {name: position for position, name in enumerate(seen)}
    stages = architecture.block(0).stages
    for before, after in pairwise(stages):
        for expert in {architecture.block(0).linear(group.linears[0]).expert for group in (*before, *after)}:
            one, other = ([p for n, p in positions.items() if n in names_of(s, expert)] for s in (before, after))
            assert not one or not other or max(one) < min(other), "stages run in the order in which they are declared"
    assert sorted(seen) == sorted(order)


@every_family
def test_rescalings_connect_what_a_block_has(family):
    architecture = architecture_of(tiny_config(family))
    with torch.device("meta"):
        block = architecture.build_block(0)
    groups = {group.linears for group in architecture.block(0).groups}
    for rescaling in architecture.block(0).rescalings:
        assert rescaling.targets in groups, "whoever reads the rescaled channels must be a target"
        assert isinstance(block.get_submodule(rescaling.source), nn.Linear) == (rescaling.kind != "norm")


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_one_by_one_compute_what_the_model_does(family, dtype):
    config = tiny_config(family, tie_word_embeddings=False)
    architecture, weights = architecture_of(config), block_weights(config)
    model = model_of(config)
    for parameter in model.parameters():  # rotary frequencies stay float32, as from_pretrained leaves them
        parameter.data = parameter.data.to(dtype)
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(1))

    def same(ours, theirs):
        """The same bits; where gate and up of a stack are one product in bfloat16, which may add in another order, each number
        but for a rounding (2^-9) in each of three blocks and the norm behind them."""
        if family not in ROUTED or dtype == torch.float32:
            return torch.equal(ours, theirs)
        return float((ours - theirs).abs().max()) <= 4 * 2**-9 * float(theirs.abs().max())

    with torch.no_grad():
        expected = model(ids, output_hidden_states=True, use_cache=False)
        hidden = model.get_input_embeddings()(ids)
        for index in range(architecture.layers):
            assert same(hidden, expected.hidden_states[index])
            hidden = Block(architecture, index, weights.__getitem__, dtype, 9).run(hidden)
        norm = architecture.build_norm().to(dtype)
        norm.load_state_dict({"weight": weights["model.norm.weight"].to(dtype)})
        logits = norm(hidden) @ weights["lm_head.weight"].to(dtype).T
    assert same(logits, expected.logits)


@pytest.mark.parametrize("model_type", ["gpt2", "", None, 7, "base", "gated_decoder", "routing"])
def test_unknown_model_types_are_refused_with_the_known_ones(model_type):
    with pytest.raises(
        UserError, match=r"model_type .* is not supported; supported: llama, mistral, mixtral, qwen2, qwen2_moe, qwen3"
    ):
        architecture_of({"model_type": model_type})
    with pytest.raises(UserError, match="is not supported"):
        architecture_of({})


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 0},
        {"rms_norm_eps": "small"},
        {"num_hidden_layers": -1},
        {"vocab_size": "many"},
        {"num_attention_heads": None},
        {"rope_theta": "x"},
        {"hidden_act": "zap"},
        {"num_key_value_heads": "two"},
        {"rope_scaling": {"rope_type": "zap"}},
        {"num_attention_heads": 4, "head_dim": -3},
        {"intermediate_size": []},
    ],
)
def test_configurations_that_make_no_sense_are_refused(changes):
    with pytest.raises(UserError, match=r"config\.json: "):
        architecture_of(tiny_config("qwen2", **changes))


def test_what_an_artifact_adds_to_the_config_is_ignored():
    config = tiny_config("llama", quantization_config={"quant_method": "quern"})
    assert architecture_of(config).layers == 3

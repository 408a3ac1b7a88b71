"""What stands in for the tokens of an expert that met few, against sums that are written out."""

import pytest
import torch
from tiny_model import block_weights, tiny_config

from quern.architectures.base import architecture_of
from quern.core.machine.parallel import Workers
from quern.quantization.calibration.activations import ActivationFile
from quern.quantization.calibration.block import Block
from quern.quantization.calibration.experts import Met, Reader, batches, make_up, needed, starved_note
from quern.quantization.calibration.statistics import Wanted, add_tap, add_up, collector

SEQUENCES, TIME = 3, 8
LINEARS = ("mlp.experts.5.gate_proj", "mlp.experts.5.up_proj")
DOWN = "mlp.experts.5.down_proj"


@pytest.fixture(scope="module")
def block():
    config = tiny_config("qwen3_moe", torch_dtype="float32", num_experts=8, num_experts_per_tok=1, num_hidden_layers=1)
    return Block(architecture_of(config), 0, block_weights(config).__getitem__, torch.float32, TIME)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    hidden = torch.randn(SEQUENCES, TIME, 64, generator=torch.Generator().manual_seed(3))
    store = ActivationFile(tmp_path_factory.mktemp("chain") / "0.bin", tuple(hidden.shape), torch.float32)
    store.write(lambda start, stop: hidden[start:stop])
    return store


@pytest.fixture(scope="module")
def read(block, source):
    """What all experts of the block read, ``(tokens, 64)``, and the router's softmax, with transformers' own modules."""
    seen = []
    handle = block.module.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        block.run(source.read(0, SEQUENCES))
    handle.remove()
    inputs = seen[0].flatten(0, 1)
    return inputs, (inputs @ block.module.mlp.gate.weight.T).softmax(-1)


def known(block, source, linears, workers, keep, **wanted):
    """A reader of the block's tokens, of which it has met ``keep``."""
    want = Wanted(hessians=linears[:1], **wanted)
    found = collector(want, block.linear(linears[0]).in_features, torch.device("cpu"))
    tap = block.capture(linears[:1], source.read(0, SEQUENCES), workers)[linears[0]]
    kept = tap.part(0, keep) if keep < tap.length else tap
    add_tap(found, want, 0, kept, workers)
    add_up([found], workers)
    return Reader(linears, 5, want, found)


def upper(hessian):
    return torch.triu(hessian)


@pytest.mark.parametrize("threads", [1, 3])
def test_all_tokens_weighed_by_the_router(block, source, read, threads):
    workers = Workers(threads)
    reader = known(block, source, LINEARS, workers, keep=0)
    assert reader.starved
    assert make_up(block, source, [reader], workers) == dict.fromkeys(LINEARS, Met(0.0, "router weights"))
    inputs, shares = read
    expected = (inputs * shares[:, 5, None]).T @ inputs
    hessian = reader.found.by_linear[LINEARS[0]].take_hessian()
    assert torch.allclose(upper(hessian), upper(expected), rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert reader.found.by_linear[LINEARS[0]].loss_scale == 0, "what nobody meets costs nothing"
    workers.close()


def test_a_down_projection_reads_what_its_expert_makes_of_them(block, source, read):
    workers = Workers(1)
    reader = known(block, source, (DOWN,), workers, keep=0)
    assert make_up(block, source, [reader], workers)[DOWN].stand_in == "router weights"
    inputs, shares = read
    expert = block.module.mlp.experts[5]
    with torch.no_grad():
        inner = torch.nn.functional.silu(inputs @ expert.gate_proj.weight.T) * (inputs @ expert.up_proj.weight.T)
    expected = (inner * shares[:, 5, None]).T @ inner
    hessian = reader.found.by_linear[DOWN].take_hessian()
    assert torch.allclose(upper(hessian), upper(expected), rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_a_router_that_looks_at_few_tokens_lets_all_of_them_count_alike(block, source, read, monkeypatch):
    """Its weights amount to less than a token for eight inputs."""
    workers, tokens = Workers(1), SEQUENCES * TIME
    peaked = torch.zeros(tokens, 8)
    peaked[4, 5] = 1000.0

    def logits(module, inputs, output):
        return (peaked[: len(inputs[0])], *output[1:])

    reader = known(block, source, LINEARS, workers, keep=0)
    handle = block.module.mlp.gate.register_forward_hook(logits)
    peaked[:, 0] = 500.0
    met = make_up(block, source, [reader], workers)
    handle.remove()
    assert met[LINEARS[1]] == Met(0.0, "all tokens")
    inputs, _ = read
    hessian = reader.found.by_linear[LINEARS[0]].take_hessian()
    expected = inputs.T @ inputs
    assert torch.allclose(upper(hessian), upper(expected), rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_inputs_of_zeros_leave_rounding_to_nearest(block, source):
    workers = Workers(1)
    expert = block.module.mlp.experts[5]
    kept = expert.up_proj.weight.data.clone()
    expert.up_proj.weight.data.zero_()
    reader = known(block, source, (DOWN,), workers, keep=0)
    met = make_up(block, source, [reader], workers)
    expert.up_proj.weight.data.copy_(kept)
    assert met[DOWN].stand_in == "nearest"
    assert not reader.found.by_linear[DOWN].take_hessian().any()


def test_losses_weigh_as_much_as_the_tokens_that_met_it(block, source, read):
    """Two of four tokens: others stand in, and the loss is that of two tokens."""
    workers = Workers(1)
    weights = torch.arange(SEQUENCES * TIME).float()
    reader = known(
        block, source, LINEARS, workers, keep=2, token_weights={LINEARS[0]: weights}, loss_scales={LINEARS[0]: 3.0}
    )
    if not reader.tokens:
        reader.found.by_linear[LINEARS[0]].tokens = 2
    make_up(block, source, [reader], workers)
    _, shares = read
    statistics = reader.found.by_linear[LINEARS[0]]
    assert statistics.loss_scale == pytest.approx(3.0 * float(weights.sum()) / float(shares[:, 5].sum()), rel=1e-5)
    assert statistics.tokens == 2, "how many met it stays known"


def test_enough_tokens_stay_as_they_are(block, source):
    workers = Workers(1)
    reader = known(block, source, ("self_attn.q_proj",), workers, keep=SEQUENCES * TIME)
    before = reader.found.by_linear["self_attn.q_proj"].hessian.clone()
    assert make_up(block, source, [reader], workers) == {"self_attn.q_proj": Met(1.0)}
    assert torch.equal(reader.found.by_linear["self_attn.q_proj"].hessian, before)


def test_how_many_are_needed():
    assert [needed(columns) for columns in (1, 8, 64, 2048)] == [1, 1, 8, 256]


def test_batches_keep_the_order_and_hold_at_least_one():
    sizes = [5, 1, 1, 9, 2, 2, 2]
    assert list(batches(sizes, int, 6)) == [[5, 1], [1], [9], [2, 2, 2]]
    assert list(batches([], int, 6)) == []
    assert list(batches([7, 7], int, 0)) == [[7], [7]]


def test_the_note_counts_kinds_and_names_some():
    layers = [{"linear": f"l{number}", "stand_in": "router weights"} for number in range(4)]
    layers += [{"linear": "m", "stand_in": "nearest"}, {"linear": "n", "met_share": 0.5}, {"linear": "o"}]
    (note,) = starved_note(layers)
    assert "5 linears" in note
    assert "4 by all tokens, as the router weighs them, 1 to nearest (l0, l1, l2 and 2 more" in note
    assert starved_note([{"linear": "n", "met_share": 0.5}]) == []

"""Fisher token weights: the streamed pass against autograd over the whole model."""

import numpy as np
import pytest
import torch
from artifacts import small_recipe
from tiny_model import random_weights, tiny_config, write_model
from torch import nn

from quern.architectures.base import architecture_of
from quern.checkpoint.checkpoint import open_checkpoint
from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.core.machine.parallel import Workers
from quern.core.progress import Silent
from quern.formats.base import FORMATS
from quern.pipeline.blockwise import sensitivity
from quern.pipeline.blockwise.job import Job, plan_of
from quern.quantization.calibration import token_weights
from quern.quantization.calibration.token_weights import normalized, output_gradient, sequence_seed

FAMILY_CONFIG = tiny_config("llama", tie_word_embeddings=False, initializer_range=0.15, torch_dtype="float32")
SEED, SEQUENCES, TIME = 7, 40, 64


def drawn_labels(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """One token for each row from its own prediction, by inverting the distribution function in float64."""
    uniform = torch.rand(len(logits), 1, generator=torch.Generator().manual_seed(seed)).double()
    cumulative = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:])[:, 0]


def whole_model_weights(model, ids: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """|dL/dy_t|^2 of every linear for one sequence, L the summed cross entropy against drawn labels."""
    outputs = {}

    def keep(name):
        def hook(module, inputs, output):
            output.retain_grad()
            outputs[name] = output

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    logits = model(ids[None], use_cache=False).logits[0]
    labels = drawn_labels(logits.detach(), whole_model_weights.seed)
    nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    return {name: output.grad[0].square().sum(-1) for name, output in outputs.items()}


@pytest.fixture(scope="module")
def pass_result(tmp_path_factory):
    """Weights by the streamed pass, by one and by three workers, and by autograd."""
    folder = tmp_path_factory.mktemp("fisher")
    model_folder = write_model(folder / "model", FAMILY_CONFIG, tokenizer=False)
    architecture = architecture_of(FAMILY_CONFIG)
    recipe = small_recipe(rounding={"method": "gptq"}, calibration={"compute_dtype": "float32"})
    ids = torch.randint(0, 296, (SEQUENCES, TIME), generator=torch.Generator().manual_seed(1))
    streamed = []
    for threads in (1, 3):
        workers = Workers(threads)
        with WorkFolder.open(folder / f"work{threads}", {"x": 1}) as work:
            plan = plan_of(recipe, architecture)
            writer = FORMATS.get("quern").writer(recipe, plan, architecture)
            job = Job(open_checkpoint(model_folder), architecture, recipe, plan, writer, ids, SEED, work,
                      workers, Silent(), torch.device("cpu"))  # fmt: skip
            sensitivity.run(job)
            streamed.append([sensitivity.token_weights(job, index) for index in range(architecture.layers)])
        workers.close()
    return streamed, autograd_weights(architecture, ids)


def autograd_weights(architecture, ids):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(architecture.config).eval()
    model.load_state_dict(random_weights(FAMILY_CONFIG))
    names = list(architecture.linears)
    sequences = []
    for position, sequence in enumerate(ids):
        whole_model_weights.seed = sequence_seed(SEED, position)
        sequences.append(whole_model_weights(model, sequence, names))
    joined = {name: torch.cat([one[name] for one in sequences]).double() for name in names}
    return {name: weights / weights.mean() for name, weights in joined.items()}


def test_streamed_weights_are_the_squared_gradients_of_the_whole_model(pass_result):
    """Float32 through three blocks forwards and back: a few hundred eps of the largest, 1e-4 with room."""
    (streamed, _), expected = pass_result
    assert len(expected) == 3 * 7
    for name, weights in expected.items():
        index, linear = name.removeprefix("model.layers.").split(".", 1)
        ours = normalized(streamed[int(index)][linear])[0].double()
        assert ours.shape == (SEQUENCES * TIME,)
        assert float((ours - weights).abs().max()) <= 1e-4 * float(weights.max()), name
    first, second = (list(expected.values())[i] for i in (0, 1))
    assert not torch.allclose(first, second, rtol=0.1), "linears that read the same inputs weigh them differently"


def test_streamed_weights_do_not_depend_on_threads(pass_result):
    (one, three), _ = pass_result
    for first, second in zip(one, three, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_pass_leaves_only_the_weights_and_what_rounds_the_head(pass_result, tmp_path_factory):
    work = next(p for p in tmp_path_factory.getbasetemp().glob("fisher*/work1"))
    assert sorted(path.name for path in work.rglob("*.*") if path.is_file()) == [
        "0000.safetensors", "0001.safetensors", "0002.safetensors", "fingerprint.json", "head.safetensors", "journal.jsonl",
    ]  # fmt: skip


def test_long_sequences_are_cut_without_a_trace(monkeypatch):
    """Logits in pieces of 256 tokens, of 7 and whole: the same labels, the same gradients but for the order of sums."""
    generator = torch.Generator().manual_seed(2)
    hidden, head = torch.randn(600, 32, generator=generator), torch.randn(50, 32, generator=generator)
    results = []
    for size in (256, 7, 600):
        monkeypatch.setattr(token_weights, "LOGIT_TOKENS", size)
        results.append(output_gradient(hidden, nn.RMSNorm(32), head, seed=3).hidden)
    for other in results[1:]:
        assert float((other - results[0]).abs().max()) <= 1e-5 * float(results[0].abs().max())


def test_labels_follow_the_models_prediction():
    """With the identity for norm and head the gradient is prediction minus label, so the labels can be counted.

    Each count is binomial: within 5 standard deviations, for 4 counts wrong once in 400,000 seeds, and the seed is fixed.
    """
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    tokens = 20_000
    gradient = output_gradient(
        probabilities.log().expand(tokens, 4).contiguous(), nn.Identity(), torch.eye(4), seed=11
    ).hidden
    labels = (probabilities - gradient).round()
    assert torch.allclose(probabilities - gradient, labels, atol=1e-5)
    assert torch.equal(labels.sum(1), torch.ones(tokens))
    counts = labels.sum(0)
    deviation = (tokens * probabilities * (1 - probabilities)).sqrt()
    assert bool(((counts - tokens * probabilities).abs() <= 5 * deviation).all()), counts
    again = output_gradient(
        probabilities.log().expand(tokens, 4).contiguous(), nn.Identity(), torch.eye(4), seed=11
    ).hidden
    other = output_gradient(
        probabilities.log().expand(tokens, 4).contiguous(), nn.Identity(), torch.eye(4), seed=12
    ).hidden
    assert torch.equal(gradient, again)
    assert not torch.equal(gradient, other)


def test_every_sequence_has_labels_of_its_own():
    seeds = {sequence_seed(seed, sequence) for seed in range(10) for sequence in range(100)}
    assert len(seeds) == 1000
    assert sequence_seed(3, 4) == sequence_seed(3, 4)


def test_weights_are_divided_by_their_mean():
    for given, expected, mean in (
        ([1.0, 2, 3], [0.5, 1, 1.5], 2),
        ([0.0, 0, 0], [1, 1, 1], 0),
        ([1e-30, 2e-30, 3e-30], [0.5, 1, 1.5], 2e-30),
    ):
        weights, scale = normalized(torch.tensor(given))
        assert np.allclose(weights.numpy(), expected, rtol=1e-6)
        assert scale == pytest.approx(mean, rel=1e-6), "what the allocator needs is not lost"

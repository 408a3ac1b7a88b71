"""Drift, sweeps and both sides, from a checkpoint to an artifact: every family, any thread count, and what they are for."""

import pytest
import torch
from artifacts import INT8, hashes, small_recipe
from safetensors.torch import save_file
from tiny_model import ROUTED, tiny_config, write_model

from quern.architectures.base import ARCHITECTURES
from quern.core.errors import BadFileError, UserError
from quern.engines.reference import load
from quern.pipeline.blockwise import output_gradients, sensitivity
from quern.pipeline.quantize import quantize

IDS = torch.randint(0, 296, (4, 48), generator=torch.Generator().manual_seed(4))
EVERYTHING = {"method": "gptq", "target": "drift", "sweeps": 1, "two_sided": True}


@pytest.mark.parametrize("family", [*sorted(set(ARCHITECTURES.names()) - set(ROUTED)), "qwen2_moe"])
def test_every_family_and_any_number_of_threads(family, tiny_text, tmp_path):
    """8 bits: the logits are those of the model but for a few percent; the same bytes with one thread and with three."""
    dtype = "bfloat16" if len(family) % 2 else "float32"
    config = tiny_config(family, torch_dtype=dtype, tie_word_embeddings=False, initializer_range=0.1)
    if family in ROUTED:  # a dense block, then a routed one whose experts all tokens meet, so that no choice changes
        config |= {"num_hidden_layers": 2, "decoder_sparse_step": 2, "num_experts_per_tok": 4}
    model = write_model(tmp_path / "model", config)
    recipe = small_recipe(
        weights={"bits": 8, "group_size": 40, "scale_dtype": "float32"},
        embedding=INT8,
        head=INT8,
        rounding={**EVERYTHING, "activation_order": True},
        transforms=[{"method": "smoothquant"}, {"method": "awq"}, {"method": "hadamard"}],
    )
    for threads in (1, 3):
        report = quantize(model, tmp_path / str(threads), recipe=recipe, calibration=[tiny_text], threads=threads)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "3")
    exact, ours = load(model, dtype="float32").logits(IDS), load(tmp_path / "1", dtype="float32").logits(IDS)
    assert float((ours - exact).norm()) < 0.05 * float(exact.norm())
    shares = [
        layer.drift_share for layer in report.layers if ".layers." in layer.linear and ".experts." not in layer.linear
    ]
    assert all(share is not None and 0 <= share <= 1 for share in shares)
    assert any(shares)


@pytest.fixture(scope="module")
def divergences(tmp_path_factory, tiny_text) -> dict[str, tuple[float, int]]:
    """Of choices on one random model, three bits: KL on other tokens, and bytes of tensors."""
    folder = tmp_path_factory.mktemp("choices")
    model = write_model(folder / "model", tiny_config(tie_word_embeddings=False, initializer_range=0.1))
    reference = load(model, dtype="float32").logits(IDS).log_softmax(-1)
    found = {}
    for name, choices in {
        "plain": {},
        "two-sided": {"two_sided": True},
        "all": {"target": "drift", "sweeps": 2, "two_sided": True},
    }.items():
        recipe = small_recipe(
            weights={"bits": 3, "symmetric": False, "group_size": 32},
            rounding={"method": "gptq", **choices},
            calibration={"token_weight": "fisher", "tokens": 4096},
        )
        quantize(model, folder / name, recipe=recipe, calibration=[tiny_text], threads=2)
        ours = load(folder / name, dtype="float32").logits(IDS).log_softmax(-1)
        size = sum(path.stat().st_size for path in (folder / name).glob("*.safetensors"))
        found[name] = float((reference.exp() * (reference - ours)).sum(-1).mean()), size
    return found


def test_they_lower_the_divergence(divergences):
    """On a random model, so that only the order counts, and of the choice that gains most there; what the others do to a
    linear, tests/contract/test_sweeps.py and tests/unit/quantization/test_drift.py say. (The figures on real models are a
    benchmark: docs/accuracy.md.)"""
    plain = divergences["plain"][0]
    assert divergences["two-sided"][0] < plain, divergences
    assert divergences["all"][0] < plain, divergences


def test_none_of_them_adds_a_byte(divergences):
    assert len({size for _, size in divergences.values()}) == 1


@pytest.fixture(scope="module")
def two_sided(tmp_path_factory, tiny_text):
    """A model, what quantizes it by both sides, and the hashes of the artifact."""
    folder = tmp_path_factory.mktemp("two-sided")
    model = write_model(folder / "model", tiny_config(tie_word_embeddings=False, initializer_range=0.1))
    recipe = small_recipe(
        weights={"bits": 3, "symmetric": False, "group_size": 32},
        rounding=EVERYTHING,
        calibration={"token_weight": "fisher", "tokens": 1024},
    )

    def run(output, **choices):
        report = quantize(model, output, recipe=recipe, calibration=[tiny_text], threads=1, **choices)
        assert any(layer.rows_left not in (None, 1.0) for layer in report.layers), "some linears are to be rounded so"
        return hashes(output)

    return run, run(folder / "artifact")


def test_gradients_that_were_kept_are_those_computed_again(two_sided, tmp_path, monkeypatch):
    run, expected = two_sided
    monkeypatch.setattr(output_gradients, "AT_ONCE", 0)
    assert run(tmp_path / "again") == expected


def test_gradients_are_shared_through_the_cache(two_sided, tmp_path, monkeypatch):
    """Whoever finds them there computes none, and makes the same bytes; damage is refused by name."""
    (run, expected), cache = two_sided, tmp_path / "cache"
    assert run(tmp_path / "first", cache=cache) == expected
    (shared,) = cache.glob("output-gradients-*")
    with monkeypatch.context() as patch:
        patch.setattr(sensitivity, "block_gradients", None)
        assert run(tmp_path / "second", cache=cache) == expected
    damaged = shared / "0000.safetensors"
    save_file({"self_attn.q_proj.hessian": torch.zeros(3)}, damaged)
    with pytest.raises(BadFileError, match="does not hold the gradients of this model"):
        run(tmp_path / "third", cache=cache)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"rounding": {"method": "nearest", "sweeps": 1}}, "sweeps goes with a rounding that reads Hessians"),
        ({"rounding": {"method": "stored", "target": "drift"}}, "not with stored"),
        ({"rounding": {"method": "gptq", "two_sided": True}, "calibration": {"token_weight": "none"}}, "token_weight: fisher"),
        ({"rounding": {"method": "gptq", "sweeps": -1}}, "sweeps"),
        ({"rounding": {"method": "gptq", "target": "theirs"}}, "drift"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(choices, said):
    with pytest.raises(UserError, match=said):
        small_recipe(**choices)

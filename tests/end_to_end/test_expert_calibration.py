"""Experts that few calibration tokens meet, Hessians in batches, and every choice of rounding on routed blocks."""

import json

import pytest
import torch
from artifacts import INT8, hashes, small_recipe
from tiny_model import tiny_config, write_model

from quern.core.errors import OutOfMemoryCapError
from quern.engines.reference import load
from quern.pipeline.blockwise import job as jobs
from quern.pipeline.quantize import quantize

IDS = torch.randint(0, 296, (4, 48), generator=torch.Generator().manual_seed(4))
GPTQ = {"weights": {"bits": 4, "group_size": 32}, "embedding": INT8, "rounding": {"method": "gptq"}}
CHOICES = {
    "plain": {},
    "fisher": {"calibration": {"token_weight": "fisher"}},
    "norm": {"calibration": {"token_weight": "norm"}},
    "everything": {
        "calibration": {"token_weight": "fisher"},
        "rounding": {"method": "gptq", "target": "drift", "sweeps": 1, "two_sided": True, "activation_order": True},
        "transforms": [{"method": "smoothquant"}, {"method": "awq"}, {"method": "hadamard"}],
    },
    "static inputs": {
        "weights": {"bits": 8, "granularity": "channel"},
        "activations": {"mode": "static"},
        "calibration": {"token_weight": "fisher"},
    },
    "tuning": {"tuning": {"passes": 1}, "calibration": {"tokens": 768}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Sixteen experts of which a token meets one: some meet few of 512 tokens, and of 64 most meet none."""
    config = tiny_config(
        "qwen2_moe", torch_dtype="float32", num_experts=16, num_experts_per_tok=1, num_hidden_layers=2,
        decoder_sparse_step=2, initializer_range=0.1,
    )  # fmt: skip
    return write_model(tmp_path_factory.mktemp("routed") / "model", config)


def quantized(model, output, text, threads=1, **choices):
    recipe = small_recipe(**{**GPTQ, **choices})
    return quantize(model, output, recipe=recipe, calibration=[text], threads=threads)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_goes_with_starved_experts(choice, model, tiny_text, tmp_path):
    choices = dict(CHOICES[choice])
    choices["calibration"] = {"tokens": 64, **choices.get("calibration", {})}
    reports = [quantized(model, tmp_path / str(threads), tiny_text, threads, **choices) for threads in (1, 3)]
    assert hashes(tmp_path / "1") == hashes(tmp_path / "3")
    layers = [layer for layer in reports[0].layers if ".experts." in layer.linear]
    assert len(layers) == 16 * 3
    assert all(layer.met_share is not None for layer in layers)
    assert {layer.stand_in for layer in layers if layer.met_share == 0} <= {"router weights", "all tokens"}
    exact, ours = load(model, dtype="float32").logits(IDS), load(tmp_path / "1", dtype="float32").logits(IDS)
    assert bool(ours.isfinite().all())
    assert float((ours - exact).norm()) < 0.6 * float(exact.norm())


def test_starved_experts_are_named(model, tiny_text, tmp_path):
    report = quantized(model, tmp_path / "out", tiny_text, calibration={"tokens": 64})
    starved = [layer.linear for layer in report.layers if layer.stand_in is not None]
    assert 0 < len(starved) < 16 * 3 + 1
    (note,) = [note for note in report.notes if "met fewer calibration tokens" in note]
    assert note.startswith(f"{len(starved)} linears are of experts")
    said = json.loads((tmp_path / "out/quern.json").read_text())
    assert note in said["notes"]
    assert [layer["linear"] for layer in said["layers"] if "stand_in" in layer] == starved
    for expert in range(16):
        shares = {layer.met_share for layer in report.layers if f".experts.{expert}." in layer.linear}
        assert len(shares) == 1, "the same tokens meet all linears of an expert"
    gates = [
        layer.met_share for layer in report.layers if layer.linear.endswith("gate_proj") and layer.met_share is not None
    ]
    assert sum(gates) == pytest.approx(1), "each token meets one expert"


def test_enough_tokens_need_no_others(model, tiny_text, tmp_path):
    changes = {"num_experts_per_tok": 16}
    config = {**json.loads((model / "config.json").read_text()), **changes}
    other = write_model(tmp_path / "model", config)
    report = quantized(other, tmp_path / "out", tiny_text)
    layers = [layer for layer in report.layers if ".experts." in layer.linear]
    assert {(layer.met_share, layer.stand_in) for layer in layers} == {(1.0, None)}
    assert not any("met fewer" in note for note in report.notes)


def test_batches_of_hessians_do_not_change_a_byte(model, tiny_text, tmp_path, monkeypatch):
    passes = []
    original = jobs.Job.__dataclass_fields__["hessian_bytes"].default
    from quern.quantization.calibration.block import Block

    capture = Block.capture

    def counted(self, linears, *rest):
        passes.append(len(linears))
        return capture(self, linears, *rest)

    monkeypatch.setattr(Block, "capture", counted)
    quantized(model, tmp_path / "whole", tiny_text)
    whole, passes[:] = list(passes), []
    monkeypatch.setattr("quern.pipeline.blockwise.memory_plan.within", lambda job, cap: replaced(job, 3 * 4 * 64**2))
    quantized(model, tmp_path / "cut", tiny_text)
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "cut")
    assert max(whole) == 16
    assert original == 2 << 30
    assert max(count for count in passes if count) < 16


def replaced(job, size):
    from dataclasses import replace

    return replace(job, hessian_bytes=size)


def test_a_cap_of_memory_cuts_batches_before_it_refuses(tiny_text, tmp_path):
    """Experts that read 512 numbers have Hessians of 1 MiB: 32 of them, or a few at a time."""
    config = tiny_config(
        "qwen3_moe", hidden_size=512, moe_intermediate_size=16, num_experts=32, num_hidden_layers=1, head_dim=16,
    )  # fmt: skip
    model = write_model(tmp_path / "model", config)
    with pytest.raises(OutOfMemoryCapError) as refused:
        quantize(
            model, tmp_path / "out", recipe=small_recipe(**GPTQ), calibration=[tiny_text], memory=1 << 20, threads=1
        )
    least = refused.value.needed if hasattr(refused.value, "needed") else None
    assert least is None or least > 0

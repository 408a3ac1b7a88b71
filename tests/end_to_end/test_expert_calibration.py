"""Experts that few calibration tokens meet, Hessians in batches, and every choice of rounding on routed blocks."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from artifacts import INT8, hashes, small_recipe
from tiny_model import tiny_config, write_model

from quern.architectures.base import architecture_of
from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.core.errors import OutOfMemoryCapError
from quern.core.machine.parallel import deterministic_workers
from quern.core.progress import Silent
from quern.engines.reference import load
from quern.formats.base import FORMATS
from quern.loading.fitting import open_model
from quern.pipeline.blockwise import memory_plan
from quern.pipeline.blockwise.job import Job, plan_of
from quern.pipeline.quantize import quantize
from quern.quantization.calibration.block import Block

MIB = 1 << 20
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
    """Eight experts of which a token meets one: some meet few of 512 tokens, and of 64 most meet none."""
    config = tiny_config(
        "qwen2_moe", torch_dtype="float32", num_experts=8, num_experts_per_tok=1, num_hidden_layers=2,
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
    report = quantized(model, tmp_path / "1", tiny_text, **choices)
    if choice == "everything":
        quantized(model, tmp_path / "3", tiny_text, 3, **choices)
        assert hashes(tmp_path / "1") == hashes(tmp_path / "3")
    layers = [layer for layer in report.layers if ".experts." in layer.linear]
    assert len(layers) == 8 * 3
    assert all(layer.met_share is not None for layer in layers)
    assert {layer.stand_in for layer in layers if layer.met_share == 0} <= {"router weights", "all tokens"}
    exact, ours = load(model, dtype="float32").logits(IDS), load(tmp_path / "1", dtype="float32").logits(IDS)
    assert bool(ours.isfinite().all())
    assert float((ours - exact).norm()) < 0.6 * float(exact.norm())


def test_starved_experts_are_named(model, tiny_text, tmp_path):
    report = quantized(model, tmp_path / "out", tiny_text, calibration={"tokens": 64})
    starved = [layer.linear for layer in report.layers if layer.stand_in is not None]
    assert 0 < len(starved) < 8 * 3 + 1
    (note,) = [note for note in report.notes if "met fewer calibration tokens" in note]
    assert note.startswith(f"{len(starved)} linears are of experts")
    said = json.loads((tmp_path / "out/quern.json").read_text())
    assert note in said["notes"]
    assert [layer["linear"] for layer in said["layers"] if "stand_in" in layer] == starved
    for expert in range(8):
        shares = {layer.met_share for layer in report.layers if f".experts.{expert}." in layer.linear}
        assert len(shares) == 1, "the same tokens meet all linears of an expert"
    gates = [
        layer.met_share for layer in report.layers if layer.linear.endswith("gate_proj") and layer.met_share is not None
    ]
    assert sum(gates) == pytest.approx(1), "each token meets one expert"


def test_enough_tokens_need_no_others(model, tiny_text, tmp_path):
    changes = {"num_experts_per_tok": 8}
    config = {**json.loads((model / "config.json").read_text()), **changes}
    other = write_model(tmp_path / "model", config)
    report = quantized(other, tmp_path / "out", tiny_text)
    layers = [layer for layer in report.layers if ".experts." in layer.linear]
    assert {(layer.met_share, layer.stand_in) for layer in layers} == {(1.0, None)}
    assert not any("met fewer" in note for note in report.notes)


def three_at_a_time(job, cap):
    return replace(job, hessian_bytes=3 * 4 * 32**2)


def test_batches_of_hessians_do_not_change_a_byte(model, tiny_text, tmp_path, monkeypatch):
    passes = []
    capture = Block.capture

    def counted(self, linears, *rest):
        passes.append(len(linears))
        return capture(self, linears, *rest)

    monkeypatch.setattr(Block, "capture", counted)
    quantized(model, tmp_path / "whole", tiny_text)
    whole, passes[:] = list(passes), []
    monkeypatch.setattr("quern.pipeline.blockwise.memory_plan.within", three_at_a_time)
    quantized(model, tmp_path / "cut", tiny_text)
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "cut")
    assert max(whole) == 8
    assert max(count for count in passes if count) < 8


@contextmanager
def job_of(model, recipe, folder) -> Iterator[Job]:
    """A quantization that is not carried out."""
    checkpoint = open_model(model)
    architecture = architecture_of(checkpoint.config)
    plan = plan_of(recipe, architecture)
    writer = FORMATS.get("quern").writer(recipe, plan, architecture)
    sequences, device = torch.empty(8, 64, dtype=torch.int64, device="meta"), torch.device("cpu")
    with WorkFolder.open(folder / "work", {}) as work, deterministic_workers(1) as workers:
        yield Job(checkpoint, architecture, recipe, plan, writer, sequences, 0, work, workers, Silent(), device)


def test_a_cap_of_memory_cuts_batches_before_it_refuses(model, tiny_text, tmp_path):
    """Of 32 Hessians of 512 x 512 float32 numbers, 1 MiB each, as many are in memory as a cap leaves room for."""
    config = {**json.loads((model / "config.json").read_text()), "hidden_size": 512, "num_hidden_layers": 1}
    wide = write_model(tmp_path / "model", config | {"decoder_sparse_step": 1, "num_experts": 32})
    recipe = small_recipe(**GPTQ, calibration={"token_weight": "none"})
    with job_of(wide, recipe, tmp_path) as job:
        whole, least = memory_plan.plan(job), memory_plan.plan(replace(job, hessian_bytes=0))
        assert 31 * MIB <= whole.block - least.block < 32 * MIB
        for room in (0, 4 * MIB, 16 * MIB):
            cut = memory_plan.within(job, least.peak + room + MIB)
            assert room <= cut.hessian_bytes <= room + 2 * MIB
            assert memory_plan.plan(cut).block <= least.block + room + 2 * MIB
        assert memory_plan.within(job, None) is job
        assert memory_plan.within(job, 64 << 30).hessian_bytes == job.hessian_bytes
    with pytest.raises(OutOfMemoryCapError) as refused:
        quantize(wide, tmp_path / "out", recipe=recipe, calibration=[tiny_text], memory=MIB, threads=1)
    assert refused.value.least_bytes > 100 * MIB

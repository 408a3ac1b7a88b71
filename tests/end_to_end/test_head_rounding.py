"""Output heads rounded with error feedback."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from artifacts import hashes, small_recipe, stored_tensors
from tiny_model import tiny_config, write_model
from tokenizers import Tokenizer
from torch import nn

from quern.core.errors import BadFileError, UserError
from quern.engines.reference import load
from quern.pipeline.quantize import quantize
from quern.quantization.calibration.token_weights import output_gradient

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "models" / "python-7m"
SCHEME = {"bits": 3, "symmetric": False, "granularity": "group", "group_size": 16}
KEPT = {"weights": {"codec": "none"}, "embedding": SCHEME, "head": SCHEME}
NEAREST = {**KEPT, "rounding": {"method": "nearest"}}
FED_BACK = {**NEAREST, "head_rounding": {"method": "gptq"}}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "of its own"])
def model(request, tmp_path_factory):
    config = tiny_config(tie_word_embeddings=request.param, torch_dtype="float32")
    return write_model(tmp_path_factory.mktemp("head") / "model", config), request.param


def test_only_the_head_changes_and_takes_as_many_bytes(model, tiny_text, tmp_path):
    path, tied = model
    given = {"calibration": [tiny_text], "threads": 1}
    nearest = quantize(path, tmp_path / "nearest", recipe=small_recipe(**NEAREST), **given)
    fed_back = quantize(path, tmp_path / "gptq", recipe=small_recipe(**FED_BACK), **given)
    before, after = stored_tensors(nearest.path), stored_tensors(fed_back.path)
    shapes = [{name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (before, after)]
    assert shapes[0] == shapes[1]
    changed = {name.rpartition(".")[0] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {"model.embed_tokens" if tied else "lm_head"}, "an embedding of its own stays rounded to nearest"


def test_it_loses_less(tmp_path):
    """Of the bundled model, whose final hidden states are as alike as those of real models are; KL on the first words of its
    own README."""
    calibration = [ROOT / "docs" / "format.md"]
    ids = (
        Tokenizer.from_file(str(BUNDLED / "tokenizer.json")).encode((ROOT / "README.md").read_text("utf-8")[:4000]).ids
    )
    logits = {}
    for name, recipe in {"nearest": NEAREST, "gptq": FED_BACK}.items():
        chosen = small_recipe(**{**recipe, "calibration": {"tokens": 2048, "sequence_length": 256}})
        quantize(BUNDLED, tmp_path / name, recipe=chosen, calibration=calibration, threads=2)
        logits[name] = load(tmp_path / name).logits(torch.tensor([ids[:512]]))[0].log_softmax(-1)
    known = load(BUNDLED).logits(torch.tensor([ids[:512]]))[0].log_softmax(-1)
    lost = {name: float((known.exp() * (known - found)).sum(-1).mean()) for name, found in logits.items()}
    assert lost["gptq"] < 0.7 * lost["nearest"], lost


def test_it_is_the_same_from_the_cache_and_with_any_number_of_threads(model, tiny_text, tmp_path):
    path, _ = model
    made = [
        quantize(path, tmp_path / name, recipe=small_recipe(**FED_BACK), calibration=[tiny_text], **given)
        for name, given in {
            "one": {"threads": 1, "cache": tmp_path / "cache"},
            "two": {"threads": 2, "cache": tmp_path / "cache"},
            "alone": {"threads": 3},
        }.items()
    ]
    assert hashes(made[0].path) == hashes(made[1].path) == hashes(made[2].path)
    (shared,) = (tmp_path / "cache").glob("token-weights-*")
    (shared / "head.safetensors").write_bytes((shared / "0000.safetensors").read_bytes())
    with pytest.raises(BadFileError, match="does not hold the Hessian of this model's head"):
        quantize(
            path, tmp_path / "three", recipe=small_recipe(**FED_BACK), calibration=[tiny_text], cache=tmp_path / "cache"
        )
    shutil.rmtree(shared)


def test_a_stopped_job_ends_with_the_same_bytes(model, tiny_text, tmp_path, monkeypatch):
    from quern.pipeline.blockwise import outer

    path, _ = model
    given = {"recipe": small_recipe(**FED_BACK), "calibration": [tiny_text], "threads": 1}
    whole = quantize(path, tmp_path / "whole", **given)
    statistics = outer._statistics

    def stopped(job, module):
        raise KeyboardInterrupt

    monkeypatch.setattr(outer, "_statistics", stopped)
    with pytest.raises(KeyboardInterrupt):
        quantize(path, tmp_path / "stopped", **given)
    monkeypatch.setattr(outer, "_statistics", statistics)
    again = quantize(path, tmp_path / "stopped", **given)
    assert again.resumed
    assert hashes(again.path) == hashes(whole.path)


def test_recipes_without_the_key_stay_what_they_were():
    assert "head_rounding" not in json.dumps(small_recipe(**NEAREST).to_json())
    assert small_recipe(**NEAREST) == small_recipe(**NEAREST, head_rounding={"method": "nearest"})
    assert small_recipe(**FED_BACK).needs_calibration
    assert not small_recipe(**NEAREST).needs_calibration


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"head_rounding": {"method": "gptq", "two_sided": True}},
            "head_rounding knows neither two_sided nor target: drift",
        ),
        (
            {"head_rounding": {"method": "gptq", "target": "drift"}},
            "head_rounding knows neither two_sided nor target: drift",
        ),
        ({"calibration": {"token_weight": "norm"}}, "head_rounding gptq counts tokens by their gradients"),
        ({"head_rounding": {"method": "gptk"}}, "gptk"),
        ({"embedding": {"codec": "none"}, "head": {"codec": "none"}}, "head_rounding is of a head that is quantized"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, said):
    with pytest.raises((UserError, ValueError), match=said):
        small_recipe(**{**FED_BACK, **changes})


def test_what_a_head_reads_and_how_much_a_token_counts():
    """Against autograd: the inputs of the head, and the squared gradient of the cross entropy by each token's logits."""
    generator = torch.Generator().manual_seed(2)
    hidden, head = torch.randn(20, 32, generator=generator), torch.randn(50, 32, generator=generator)
    norm = nn.RMSNorm(32)
    found = output_gradient(hidden, norm, head, seed=3)
    assert torch.equal(found.inputs, norm(hidden).detach())
    logits = nn.functional.linear(norm(hidden), head).detach().requires_grad_()
    # The labels that were drawn, from the gradient that is known to be right.
    candidates = []
    for label in range(50):
        loss = nn.functional.cross_entropy(logits, torch.full((20,), label), reduction="sum")
        candidates.append(torch.autograd.grad(loss, logits)[0].square().sum(-1))
    distances = (torch.stack(candidates) - found.squares).abs() / found.squares
    assert float(distances.amin(0).max()) < 1e-5

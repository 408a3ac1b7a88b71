"""The main job, asked for what it cannot do: another job's folder, full disks, recipes and inputs that make no sense."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from artifacts import INT8, hashes, small_recipe, stored_tensors
from safetensors.torch import load_file, save_file

from quern.checkpoint import files
from quern.core.errors import BadFileError, UserError
from quern.pipeline.quantize import quantize

GPTQ = {"weights": {"bits": 4, "symmetric": False, "group_size": 32}, "rounding": {"method": "gptq"}}
NEAREST = {"weights": {"bits": 4, "group_size": 32}}


# The same output folder again


def test_another_job_in_the_same_place_is_refused_and_fresh_replaces(tiny_model, tiny_text, tmp_path):
    other_text = tmp_path / "other.txt"
    other_text.write_text(tiny_text.read_text() + "more", "utf-8")
    job = {"recipe": small_recipe(**GPTQ), "calibration": [tiny_text], "seed": 0, "threads": 1}
    first = quantize(tiny_model, tmp_path / "out", **job)
    assert quantize(tiny_model, tmp_path / "out", **job).resumed
    before = hashes(first.path)
    changes = {
        "recipe": {"recipe": small_recipe(**GPTQ, head=INT8)},
        "seed": {"seed": 1},
        "calibration_sha256": {"calibration": [other_text]},
    }
    for name, change in changes.items():
        with pytest.raises(UserError, match=f"(?s)holds the result of another job.*\n  {name}.*fresh=True"):
            quantize(tiny_model, tmp_path / "out", **{**job, **change})
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "config.json").write_text(
        json.dumps({**json.loads((model / "config.json").read_text()), "rope_theta": 5000.0})
    )
    with pytest.raises(UserError, match=r"\n  model_sha256: .* -> "):
        quantize(model, tmp_path / "out", **job)
    assert hashes(first.path) == before
    again = quantize(tiny_model, tmp_path / "out", **{**job, "seed": 1}, fresh=True)
    assert not again.resumed
    assert hashes(again.path) != before
    quantize(tiny_model, tmp_path / "out", **job, fresh=True)
    assert hashes(first.path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other.txt", "model"}


def test_another_job_in_the_work_folder_is_refused_with_what_differs(tiny_model, tiny_text, tmp_path, monkeypatch):
    job = {"calibration": [tiny_text], "threads": 1}
    interrupt_after(monkeypatch, 12)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model, tmp_path / "out", recipe=small_recipe(**GPTQ), **job)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"(?s)belongs to another job.*recipe\.weights\.bits: 4 -> 3.*fresh=True"):
        quantize(
            tiny_model,
            tmp_path / "out",
            recipe=small_recipe(**{**GPTQ, "weights": {**GPTQ["weights"], "bits": 3}}),
            **job,
        )
    report = quantize(tiny_model, tmp_path / "out", recipe=small_recipe(**GPTQ), **job)
    assert report.resumed
    assert not (tmp_path / "out.quern-work").exists()


@pytest.mark.parametrize("content", ["a file", "a folder of something else", "a damaged artifact"])
def test_what_is_not_ours_is_never_overwritten(content, tiny_model, tmp_path):
    output = tmp_path / "out"
    if content == "a file":
        output.write_text("precious")
    else:
        output.mkdir()
        (output / ("quern.json" if content == "a damaged artifact" else "precious")).write_text('{"fingerprint": 7}')
    for fresh in (False, True):
        said = "exists and is no(t an artifact of quern| folder). Choose another output folder"
        with pytest.raises(UserError, match=said):
            quantize(tiny_model, output, recipe=small_recipe(**NEAREST), fresh=fresh)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def interrupt_after(monkeypatch, calls: int, error: BaseException | None = None) -> None:
    """Make the disk fail (or the user lose patience) at a call of fsync."""
    real, left = os.fsync, [calls]

    def fsync(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise error or KeyboardInterrupt
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


# Disks


@pytest.mark.parametrize("calls", [0, 7, 31, 60])
def test_a_disk_that_fills_up_loses_nothing(calls, tiny_model, tiny_text, tmp_path, monkeypatch):
    job = {"recipe": small_recipe(**GPTQ), "calibration": [tiny_text], "threads": 1}
    quantize(tiny_model, tmp_path / "whole", **job)
    interrupt_after(monkeypatch, calls, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(UserError, match=r"not enough room to write .*Free some space"):
        quantize(tiny_model, tmp_path / "out", **job)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    quantize(tiny_model, tmp_path / "out", **job)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_a_disk_known_to_be_too_small_is_said_before_anything_is_computed(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_free_bytes", lambda folder: 1000)
    with pytest.raises(UserError, match=r"not enough room to write .*are needed and 1 kB are free"):
        quantize(tiny_model, tmp_path / "out", recipe=small_recipe(**NEAREST))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_may_not_be_written(tiny_model, tmp_path, monkeypatch):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.geteuid() == 0:  # nothing is forbidden to root

        def refuse(self, *arguments, **options):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))

        monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot write .*locked.*: Permission denied. Choose another folder"):
        quantize(tiny_model, locked / "out", recipe=small_recipe(**NEAREST))
    monkeypatch.undo()
    assert list(locked.iterdir()) == []


def test_an_output_below_a_file(tiny_model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        quantize(tiny_model, tmp_path / "file" / "out", recipe=small_recipe(**NEAREST))


# Requests that make no sense


REFUSED = {
    "unknown key": ({"weights": {"bit": 4}}, r"weights\.bit: unknown key; known keys here: .*bits"),
    "too many bits": ({"weights": {"bits": 9}}, r"weights\.bits: .*less than or equal to 8"),
    "group size without groups": ({"weights": {"granularity": "channel", "group_size": 64}}, "group_size goes with granularity: group"),
    "unknown codec": ({"weights": {"codec": "zap"}}, "unknown codec 'zap'; known: .*integer"),
    "unknown observer": ({"weights": {"observer": "zap"}}, "unknown observer 'zap'; known: adaptive, entropy, mean_squared_error"),
    "unknown rounding": ({"rounding": {"method": "zap"}}, "unknown rounding 'zap'; known: gptq, nearest"),
    "unknown transform": ({"transforms": [{"method": "zap"}]}, "unknown transform 'zap'; known: awq, hadamard, smoothquant"),
    "awq with a strength": ({"transforms": [{"method": "awq", "strength": 0.5}]}, "awq searches its exponent and takes no strength"),
    "signs of another transform": (
        {"transforms": [{"method": "awq", "random_signs": False}]}, "random_signs goes with transform hadamard, not with awq"),
    "unknown format": ({"format": "zap"}, "unknown format 'zap'; known: awq, compressed-tensors, gguf, gptq, onnx, quern"),
    "int8 activations with zero points": (
        {"weights": {"symmetric": False}, "activations": {"mode": "static"}}, "int8 activations need symmetric integer"),
    "unknown activation observer": (
        {"weights": INT8, "activations": {"mode": "static", "observer": "zap"}}, "unknown observer 'zap'"),
    "pattern that matches nothing": (
        {"overrides": [{"pattern": "*.zap", "bits": 8}]},
        r"no linear matches '\*\.zap'; names look like model\.layers\.0\.self_attn\.q_proj"),
    "format that cannot": ({"format": "compressed-tensors", "weights": {"group_size": 100}}, "(?s)cannot store .*use format='quern'"),
    "tokens below one": ({"calibration": {"tokens": 0}}, r"calibration\.tokens"),
    "damping of zero": ({"rounding": {"damping": 0}}, r"rounding\.damping"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_recipes_are_refused_before_anything_is_written(name, tiny_model, tiny_text, tmp_path):
    choices, match = REFUSED[name]
    with pytest.raises(UserError, match=match):
        quantize(tiny_model, tmp_path / "out", recipe=small_recipe(**choices), calibration=[tiny_text])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "[1]", '{"eos_token_id": ["256"]}'])
def test_what_no_artifact_could_generate_with(content, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "generation_config.json").write_text(content)
    with pytest.raises(BadFileError, match="generation_config|eos_token_id"):
        quantize(model, tmp_path / "out", recipe=small_recipe(**NEAREST))
    assert not list(tmp_path.glob("out*"))


def test_an_override_may_keep_some_linears_unquantized(tiny_model, tmp_path):
    recipe = small_recipe(**NEAREST, overrides=[{"pattern": "*.down_proj", "codec": "none"}])
    quantize(tiny_model, tmp_path / "out", recipe=recipe, threads=1)
    names = set(stored_tensors(tmp_path / "out"))
    assert "model.layers.1.mlp.down_proj.weight" in names
    assert "model.layers.1.mlp.up_proj.codes" in names


@pytest.mark.parametrize("transforms", [[], [{"method": "awq"}]])
@pytest.mark.parametrize("mode", ["none", "static"])
def test_calibration_without_a_hessian_needs_no_token_weights(transforms, mode, tiny_model, tiny_text, tmp_path):
    """The default of token_weight is fisher, and rounding to nearest has no use for it."""
    recipe = small_recipe(weights=INT8, activations={"mode": mode}, transforms=transforms)
    assert recipe.calibration.token_weight == "fisher"
    quantize(tiny_model, tmp_path / "out", recipe=recipe, calibration=[tiny_text], threads=1)
    scales = [name for name in stored_tensors(tmp_path / "out") if name.endswith("input_scale")]
    assert len(scales) == (3 * 7 if mode == "static" else 0)


def damaged(tiny_model: Path, folder: Path, change) -> Path:
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_weights_that_are_no_numbers_are_refused_by_name(value, name, method, tiny_model, tiny_text, tmp_path):
    def spoil(weights):
        weights[name].view(-1)[3] = value

    model = damaged(tiny_model, tmp_path / "model", spoil)
    recipe = small_recipe(weights={"bits": 4, "group_size": 32}, rounding={"method": method})
    with pytest.raises(BadFileError, match=f"tensor '{name}' holds 1 NaN or infinite values among"):
        quantize(model, tmp_path / "out", recipe=recipe, calibration=[tiny_text], threads=1)
    assert not (tmp_path / "out").exists()


def test_what_calibration_needs_is_said(tiny_model, tiny_text, tmp_path):
    def attempt(match, model=tiny_model, text=tiny_text, **calibration):
        with pytest.raises(UserError, match=match):
            quantize(model, tmp_path / "out", recipe=small_recipe(**GPTQ, calibration=calibration), calibration=[text])
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.quern-work").exists()

    short = tmp_path / "short.txt"
    short.write_text("too short")
    attempt(
        r"has \d+ tokens; the recipe wants 8 sequences of 64 = 512.*tokens and calibration.sequence_length to at most \d",
        text=short,
    )
    attempt(r"the recipe wants .*or fewer calibration_tokens: at most \d\d+$", tokens=10_000_000)
    attempt("cannot be read: No such file", text=tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes("Gr\xfc\xdfe".encode("latin-1"))
    attempt("is not UTF-8 text \\(byte 2\\). Convert it", text=tmp_path / "latin.txt")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model / name, bare)
    attempt("has no tokenizer", model=bare)

    def fewer_rows(weights):
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:250].contiguous()

    small = damaged(tiny_model, tmp_path / "small", fewer_rows)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 250}))
    attempt(r"the text has token \d+ .*the embedding has 250 rows", model=small)


def test_an_artifact_is_not_quantized_again(tiny_model, tmp_path):
    quantize(tiny_model, tmp_path / "first", recipe=small_recipe(**NEAREST), threads=1)
    with pytest.raises(UserError, match="is already quantized"):
        quantize(tmp_path / "first", tmp_path / "out", recipe=small_recipe(**NEAREST))


def test_unknown_and_missing_devices(tiny_model, tmp_path):
    with pytest.raises(UserError, match="unknown device 'tpu'; known: cpu, cuda"):
        quantize(tiny_model, tmp_path / "out", recipe=small_recipe(**NEAREST), device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees no CUDA device here. Use device='cpu'"):
            quantize(tiny_model, tmp_path / "out", recipe=small_recipe(**NEAREST), device="cuda")
    assert not (tmp_path / "out").exists()

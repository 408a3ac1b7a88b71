"""The main job from a checkpoint to an artifact: every shipped recipe, every family, every refusal."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from artifacts import INT8, LENGTH, TOKENS, hashes, small_recipe, stored_tensors
from safetensors.torch import load_file, save_file
from tiny_model import tiny_config, write_model

from quern.architectures.base import ARCHITECTURES
from quern.checkpoint import files
from quern.core.errors import BadFileError, UserError
from quern.core.recipe import Recipe, load_recipe, profile_names
from quern.engines.reference import load
from quern.pipeline.quantize import QuantizeReport, quantize

IDS = torch.randint(0, 296, (2, 24), generator=torch.Generator().manual_seed(4))
GPTQ = {"weights": {"bits": 4, "symmetric": False, "group_size": 32}, "rounding": {"method": "gptq"}}
NEAREST = {"weights": {"bits": 4, "group_size": 32}}

LOADS = """
import quern
from transformers import AutoModelForCausalLM
import sys, torch
torch.set_num_threads(1)
ids = torch.tensor(eval(sys.argv[1]))
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        print(model(ids, use_cache=False).logits.float().flatten().tolist()[::100])
"""


def shortened(name: str) -> Recipe:
    """A shipped recipe with less calibration text."""
    recipe = load_recipe(name)
    fewer = recipe.calibration.model_copy(update={"tokens": TOKENS, "sequence_length": LENGTH})
    return recipe.model_copy(update={"calibration": fewer})


@pytest.fixture(scope="module")
def shipped(tiny_model, tmp_path_factory) -> dict[str, QuantizeReport]:
    """Artifacts of all shipped recipes, calibrated on the default text."""
    folder = tmp_path_factory.mktemp("shipped")
    return {name: quantize(tiny_model, folder / name, recipe=shortened(name), threads=1) for name in profile_names()}


def test_artifacts_load_after_import_quern_alone(shipped):
    folders = [str(report.path) for report in shipped.values()]
    command = [sys.executable, "-W", "error::UserWarning", "-c", LOADS, str(IDS.tolist()), *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for folder, line in zip(folders, done.stdout.splitlines(), strict=True):
        assert json.loads(line) == load(folder).logits(IDS).flatten().tolist()[::100], folder


@pytest.mark.parametrize("name", profile_names())
def test_report_counts_from_the_files(name, shipped, tiny_model):
    report = shipped[name]
    size = sum(path.stat().st_size for path in report.path.iterdir())
    parameters = sum(tensor.numel() for tensor in load_file(tiny_model / "model.safetensors").values())
    others = sum(path.stat().st_size for path in tiny_model.iterdir() if path.suffix != ".safetensors")
    header = (tiny_model / "model.safetensors").stat().st_size - 2 * parameters
    assert report.bytes == size
    assert report.compression == pytest.approx(1 - size / (2 * parameters + others + header))
    stored = sum(tensor.nbytes for tensor in stored_tensors(report.path).values())
    assert report.bits_per_weight == pytest.approx(8 * stored / parameters)
    assert report.recipe == shortened(name)
    assert not report.resumed
    assert report.seconds > 0
    assert report.peak_rss_bytes > 50e6


@pytest.mark.parametrize("name", profile_names())
def test_every_quantized_module_has_its_error(name, shipped):
    report = shipped[name]
    config = json.loads((report.path / "config.json").read_text())["quantization_config"]
    assert {layer.linear for layer in report.layers} == set(config["modules"])
    assert len(report.layers) == len(config["modules"])
    tensors = stored_tensors(report.path)
    for layer in report.layers:
        assert 0 < layer.relative_error < 1
        parts = sum(
            t.nbytes
            for key, t in tensors.items()
            if key.rpartition(".")[0] == layer.linear and not key.endswith("bias")
        )
        shape = {
            "q": (64, 64),
            "k": (32, 64),
            "v": (32, 64),
            "o": (64, 64),
            "gate": (96, 64),
            "up": (96, 64),
            "down": (64, 96),
        }
        rows, columns = shape.get(layer.linear.rpartition(".")[2].removesuffix("_proj"), (300, 64))
        assert layer.bits_per_weight == pytest.approx(8 * parts / (rows * columns))


def test_provenance_names_everything_that_the_bytes_depend_on(shipped):
    provenance = json.loads((shipped["balanced"].path / "quern.json").read_text())
    assert set(provenance) == {"fingerprint", "layers"}
    assert set(provenance["fingerprint"]) >= {"quern", "model_sha256", "recipe", "calibration_sha256", "seed", "device"}
    assert Recipe.model_validate(provenance["fingerprint"]["recipe"]) == shortened("balanced")


def test_index_and_tokenizer_are_complete(shipped, tiny_model):
    for report in shipped.values():
        index = json.loads((report.path / "model.safetensors.index.json").read_text())
        tensors = stored_tensors(report.path)
        assert set(index["weight_map"]) == set(tensors)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (report.path / name).read_bytes() == (tiny_model / name).read_bytes()
        assert not [path for path in report.path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("family", ARCHITECTURES.names())
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_family_survives_the_whole_path(family, dtype, tiny_text, tmp_path):
    """8 bits everywhere, both transforms, GPTQ: the logits must be those of the model but for a few percent."""
    model = write_model(
        tmp_path / "model", tiny_config(family, torch_dtype=dtype, tie_word_embeddings=False, initializer_range=0.1)
    )
    recipe = small_recipe(
        weights={"bits": 8, "group_size": 40, "scale_dtype": "float32"},
        embedding=INT8,
        head=INT8,
        rounding={"method": "gptq", "activation_order": True},
        transforms=[{"method": "smoothquant"}, {"method": "awq"}],
    )
    report = quantize(model, tmp_path / "out", recipe=recipe, calibration=[tiny_text], threads=1)
    exact, ours = load(model, dtype="float32").logits(IDS), load(tmp_path / "out", dtype="float32").logits(IDS)
    assert not torch.equal(ours, exact)
    assert float((ours - exact).norm()) < 0.05 * float(exact.norm())
    assert all(layer.relative_error < 1e-3 for layer in report.layers)
    kept = stored_tensors(tmp_path / "out")["model.layers.0.input_layernorm.weight"]
    assert kept.dtype == getattr(torch, dtype), "what is not quantized keeps its dtype"


def test_nothing_quantized_is_the_model_itself(tiny_model, tiny_text, tmp_path):
    recipe = small_recipe(weights={"codec": "none"})
    quantize(tiny_model, tmp_path / "out", recipe=recipe, threads=1)
    before, after = load_file(tiny_model / "model.safetensors"), stored_tensors(tmp_path / "out")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_fisher_weights_and_feedback_lower_the_divergence(tmp_path, tiny_text):
    """Order of the methods on a random model, three bits: GPTQ beats nearest. (The figures on a real model are a benchmark.)"""
    model = write_model(tmp_path / "model", tiny_config(tie_word_embeddings=False, initializer_range=0.1))
    reference = load(model, dtype="float32").logits(IDS).log_softmax(-1)
    divergence = {}
    for name, rounding, weight in (
        ("nearest", "nearest", "none"),
        ("gptq", "gptq", "none"),
        ("fisher", "gptq", "fisher"),
    ):
        recipe = small_recipe(
            weights={"bits": 3, "symmetric": False, "group_size": 32},
            rounding={"method": rounding},
            calibration={"token_weight": weight, "tokens": 4096},
        )
        quantize(model, tmp_path / name, recipe=recipe, calibration=[tiny_text], threads=1)
        ours = load(tmp_path / name, dtype="float32").logits(IDS).log_softmax(-1)
        divergence[name] = float((reference.exp() * (reference - ours)).sum(-1).mean())
    assert divergence["gptq"] < 0.9 * divergence["nearest"], divergence
    assert divergence["fisher"] < 0.9 * divergence["nearest"], divergence


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
        with pytest.raises(UserError, match=f"holds the result of another job: {name} differ.*--fresh"):
            quantize(tiny_model, tmp_path / "out", **{**job, **change})
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "config.json").write_text(
        json.dumps({**json.loads((model / "config.json").read_text()), "rope_theta": 5000.0})
    )
    with pytest.raises(UserError, match="model_sha256 differ"):
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
    with pytest.raises(UserError, match=r"(?s)belongs to another job.*recipe\.weights\.bits: 4 -> 3.*--fresh"):
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
        with pytest.raises(UserError, match="exists and is not an artifact of quern. Choose another output folder"):
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
    with pytest.raises(UserError, match=r"not enough room to write .*bytes are needed and 1000 are free"):
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
    "unknown observer": ({"weights": {"observer": "zap"}}, "unknown observer 'zap'; known: mean_squared_error"),
    "unknown rounding": ({"rounding": {"method": "zap"}}, "unknown rounding 'zap'; known: gptq, nearest"),
    "unknown transform": ({"transforms": [{"method": "zap"}]}, "unknown transform 'zap'; known: awq, smoothquant"),
    "awq with a strength": ({"transforms": [{"method": "awq", "strength": 0.5}]}, "awq searches its exponent and takes no strength"),
    "unknown format": ({"format": "zap"}, "unknown format 'zap'; known: compressed-tensors, quern"),
    "int8 activations with 4 bits": ({"activations": {"mode": "static"}}, "int8 activations need 8-bit symmetric weights"),
    "unknown activation observer": (
        {"weights": INT8, "activations": {"mode": "static", "observer": "zap"}}, "unknown observer 'zap'"),
    "pattern that matches nothing": (
        {"overrides": [{"pattern": "*.zap", "bits": 8}]},
        r"no linear matches the pattern '\*\.zap'; names look like model\.layers\.0\.self_attn\.q_proj"),
    "format that cannot": ({"format": "compressed-tensors", "weights": {"group_size": 100}}, "cannot store .*use --format quern"),
    "tokens below one": ({"calibration": {"tokens": 0}}, r"calibration\.tokens"),
    "damping of zero": ({"rounding": {"damping": 0}}, r"rounding\.damping"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_recipes_are_refused_before_anything_is_written(name, tiny_model, tiny_text, tmp_path):
    choices, match = REFUSED[name]
    with pytest.raises(UserError, match=match):
        quantize(tiny_model, tmp_path / "out", recipe=small_recipe(**choices), calibration=[tiny_text])
    assert list(tmp_path.iterdir()) == []


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
        r"has \d+ tokens; the recipe wants 8 sequences of 64 = 512.*set calibration.tokens to at most 0", text=short
    )
    attempt(r"the recipe wants .*set calibration.tokens to at most \d\d+", tokens=10_000_000)
    attempt("cannot be read: No such file", text=tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes("Gr\xfc\xdfe".encode("latin-1"))
    attempt("is not UTF-8 text. Convert it", text=tmp_path / "latin.txt")
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
    attempt("tokenizer does not fit the embedding of 250 rows", model=small)


def test_an_artifact_is_not_quantized_again(shipped, tmp_path):
    with pytest.raises(UserError, match="is already quantized"):
        quantize(shipped["rtn4"].path, tmp_path / "out", recipe=small_recipe(**NEAREST))


def test_unknown_and_missing_devices(tiny_model, tmp_path):
    with pytest.raises(UserError, match="unknown device 'tpu'; known: cpu, cuda"):
        quantize(tiny_model, tmp_path / "out", recipe=small_recipe(**NEAREST), device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees no CUDA device here. Use --device cpu"):
            quantize(tiny_model, tmp_path / "out", recipe=small_recipe(**NEAREST), device="cuda")
    assert not (tmp_path / "out").exists()

"""Hub models shard by shard: the same artifact, few shards on the disk, and servers that misbehave."""

import hashlib
import itertools
import json
import time
from pathlib import Path

import pytest
import torch
from artifacts import small_recipe
from hub_server import COMMIT, Hub, serving
from repository_tools import load_tool
from tiny_model import calibration_text, tiny_config
from typer.testing import CliRunner

import quern
from quern.checkpoint.checkpoint import open_checkpoint
from quern.checkpoint.streaming import hub_files, source
from quern.checkpoint.streaming.folder import streamed
from quern.checkpoint.streaming.source import KEPT
from quern.cli.main import app
from quern.core.errors import BadFileError, UserError

LAYERS = 4
SHARD = "model-00003-of-00005.safetensors"
TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint with a shard for each block and one for the rest."""
    tool = load_tool("make_synthetic_checkpoint")
    config = tiny_config("qwen2", initializer_range=0.02, num_hidden_layers=LAYERS, eos_token_id=None)
    folder = tool.make(tmp_path_factory.mktemp("hub") / "model", config)
    tool.write_shards(folder)
    return folder


@pytest.fixture
def hub(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _seconds: time.monotonic())
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)
    found = Hub(model)
    with serving(found) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield found


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(calibration_text()[:20_000], "utf-8")
    return path


def on_disk(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*.safetensors"))


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("passes", ["once", "forward, backward and again"])
def test_the_artifact_is_the_same_and_few_shards_are_there_at_once(passes, hub, model, text, tmp_path, monkeypatch):
    recipe = small_recipe(weights={"group_size": 32}, rounding={"method": "nearest" if passes == "once" else "gptq"})
    most, read = [], source.read_tensor
    monkeypatch.setattr(source, "read_tensor", lambda *given: most.append(len(on_disk(tmp_path))) or read(*given))
    whole = quern.quantize(model, tmp_path / "whole", recipe=recipe, calibration=[text], threads=1)
    came = quern.quantize("org/model", tmp_path / "came", recipe=recipe, calibration=[text], threads=1, stream=True)
    assert hashes(came.path) == hashes(whole.path)
    assert came.bits_per_weight == whole.bits_per_weight
    assert 1 <= max(most) <= KEPT + 1 < LAYERS + 1
    assert on_disk(tmp_path) == []
    times = {count for name, count in hub.sent().items() if name.endswith(".safetensors")}
    assert times == {1} if passes == "once" else max(times) <= 4
    hub.asked.clear()
    again = quern.quantize("org/model", tmp_path / "came", recipe=recipe, calibration=[text], threads=1, stream=True)
    assert again.seconds is None
    assert not hub.asked, "what is finished needs no shard"


def test_planning_and_training_stream_too(hub, model, text, tmp_path):
    """The same plan and the same artifact as of the whole download, and no shard is left."""
    four, eight = ({"bits": bits, "granularity": "channel"} for bits in (4, 8))
    allocation = {"candidates": [four, eight], "outer": [eight], "target": {"bits": 7.0}}
    recipe = small_recipe(allocation=allocation, rounding={"method": "gptq"}, calibration={"tokens": 128})
    given = {"recipe": recipe, "calibration": [text], "threads": 1}
    plans = [
        quern.plan(path, cache=tmp_path / f"cache-{stream}", stream=stream, **given)
        for path, stream in (("org/model", True), (model, False))
    ]
    assert plans[0].matrices == plans[1].matrices
    assert on_disk(tmp_path) == []
    asked = {"recipe": "rtn4", "train": "scales", "texts": [text], "tokens": 512, "threads": 1}
    trained = [
        quern.train(path, tmp_path / f"trained-{stream}", stream=stream, **asked)
        for path, stream in (("org/model", True), (model, False))
    ]
    assert hashes(trained[0].path) == hashes(trained[1].path)
    assert on_disk(tmp_path) == []


def test_inspecting_fetches_headers_alone(hub, model, tmp_path):
    found, whole = quern.inspect("org/model", stream=True), quern.inspect(model)
    assert [(row.name, row.shape, row.bytes) for row in found.tensors] == [
        (row.name, row.shape, row.bytes) for row in whole.tensors
    ]
    assert (found.parameters, found.bits_per_weight) == (whole.parameters, whole.bits_per_weight)
    assert all(part is not None for name, part in hub.asked if name.endswith(".safetensors"))
    assert on_disk(tmp_path) == []
    shown = CliRunner().invoke(app, ["inspect", "org/model", "--stream", "--json"])
    assert json.loads(shown.stdout)["parameters"] == whole.parameters


def test_the_next_shard_comes_meanwhile_in_either_direction(hub, tmp_path):
    source = open_checkpoint(streamed("org/model")).source
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(LAYERS)]
    for order in (names, list(reversed(names))):
        source.read(order[0])
        for name, ahead in itertools.pairwise(order[1:]):
            source.read(name)
            source.shards._ahead[1].join()
            assert source.place(ahead).is_file()
    source.shards.clear()
    assert on_disk(tmp_path) == []


def test_a_file_that_breaks_off_goes_on_where_it_stopped(hub, model, tmp_path):
    checkpoint = open_checkpoint(streamed("org/model"))
    hub.broken[SHARD] = 20_000
    assert torch.equal(checkpoint.read(TENSOR), open_checkpoint(model).read(TENSOR))
    ranges = [part for name, part in hub.asked if name == SHARD and part not in (None, "bytes=0-100000")]
    assert ranges
    assert all(int(part.removeprefix("bytes=").rstrip("-")) > 0 for part in ranges)


def test_a_server_that_vanishes_is_told_and_the_next_run_goes_on(hub, model, tmp_path):
    checkpoint = open_checkpoint(streamed("org/model"))
    part = checkpoint.source.manifest.remote(SHARD).part(checkpoint.path)
    part.write_bytes(hub.files[SHARD][:30_000])
    hub.gone = True
    with pytest.raises(
        UserError, match=rf"getting {SHARD} of org/model broke off at 30 kB of 63\.2 kB: .*what has come is kept"
    ):
        checkpoint.read(TENSOR)
    assert part.stat().st_size == 30_000
    with pytest.raises(UserError, match="getting it from the Hub failed"):
        streamed("org/model")
    hub.gone = False
    assert torch.equal(open_checkpoint(streamed("org/model")).read(TENSOR), open_checkpoint(model).read(TENSOR))
    assert (SHARD, "bytes=30000-") in hub.asked


def test_other_bytes_than_the_hub_names_are_refused_with_the_shard(hub, model, tmp_path):
    hub.wrong.add(SHARD)
    checkpoint = open_checkpoint(streamed("org/model"))
    with pytest.raises(BadFileError, match=rf"{SHARD}: of org/model came with the hash .* and the Hub says"):
        checkpoint.read(TENSOR)
    assert SHARD not in on_disk(tmp_path)
    assert not checkpoint.source.manifest.remote(SHARD).part(checkpoint.path).exists()
    hub.wrong.clear()
    assert torch.equal(checkpoint.read(TENSOR), open_checkpoint(model).read(TENSOR))


def test_shards_in_git_are_held_to_their_git_hash(hub, model, tmp_path, monkeypatch):
    described = hub.described()
    for one in described["siblings"]:
        one.pop("lfs", None)
    monkeypatch.setattr(hub, "described", lambda: described)
    checkpoint = open_checkpoint(streamed("org/model"))
    assert torch.equal(checkpoint.read(TENSOR), open_checkpoint(model).read(TENSOR))
    hub.wrong.add("model-00001-of-00005.safetensors")
    with pytest.raises(BadFileError, match="came with the hash"):
        checkpoint.read("model.norm.weight")


def test_a_header_that_was_another_one_is_refused(hub, tmp_path):
    folder = streamed("org/model")
    said = json.loads((folder / "stream.json").read_text("utf-8"))
    said["tensors"][TENSOR]["dtype"] = "F16"
    (folder / "stream.json").write_text(json.dumps(said), "utf-8")
    with pytest.raises(BadFileError, match="as its header on the Hub said"):
        open_checkpoint(folder).read(TENSOR)


@pytest.mark.parametrize(("change", "words"), [
    ({"version": 2}, "version"),
    ({"revision": "main"}, "revision"),
    ({"shards": {"../x.safetensors": {"size": 1, "sha256": "0" * 64}}}, "shards"),
    ({"shards": {"x.safetensors": {"size": 1}}}, "one hash"),
    ({"tensors": {"x": {"shard": "y.safetensors", "dtype": "BF16", "shape": [1]}}}, "unknown shard"),
    ({"more": 1}, "more"),
])  # fmt: skip
def test_a_description_that_makes_no_sense_is_refused(change, words, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', "utf-8")
    content = {"version": 1, "repository": "org/model", "revision": COMMIT, "shards": {}, "tensors": {}, **change}
    (tmp_path / "stream.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(BadFileError, match=words):
        open_checkpoint(tmp_path)


def test_what_cannot_be_streamed_is_refused(hub, model, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"(stream=True|--stream) is for models of the Hub"):
        quern.inspect(model, stream=True)
    with pytest.raises(UserError, match="'org/other' is neither a local folder nor a model that the Hub shows you"):
        streamed("org/other")
    usage = hub_files.shutil.disk_usage(tmp_path)._replace(free=100)
    with monkeypatch.context() as full:
        full.setattr(hub_files.shutil, "disk_usage", lambda _folder: usage)
        with pytest.raises(UserError, match=r"not enough room for .* are needed and 100 bytes are free"):
            streamed("org/model")
    index = json.loads(hub.files["model.safetensors.index.json"])
    index["weight_map"][TENSOR] = "other.safetensors"
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    with pytest.raises(BadFileError, match=r"names 'other\.safetensors', which org/model has not"):
        streamed("org/model")
    hub.files = {name: data for name, data in hub.files.items() if "safetensors" not in name}
    with pytest.raises(UserError, match="has no safetensors files, and pickles are not read"):
        streamed("org/model")

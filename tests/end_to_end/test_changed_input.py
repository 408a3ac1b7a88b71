"""Weights that are no numbers, or do not stay what they were, stop a job by name; what was finished is kept."""

import json
import shutil

import pytest
from artifacts import hashes, small_recipe
from safetensors.torch import load_file, save_file
from tiny_model import tiny_config, write_model

import quern
from quern.core.errors import BadFileError, UserError
from quern.core.progress import Silent

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def in_two_shards(folder):
    """A tiny model whose last block and final norm lie in a shard of their own."""
    write_model(folder, tiny_config(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: SECOND if ".2." in name or "model.norm" in name else FIRST for name in weights}
    for shard in (FIRST, SECOND):
        save_file({n: w for n, w in weights.items() if places[n] == shard}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return folder


class After(Silent):
    """Does something once the first block is finished."""

    def __init__(self, act):
        self.act = act

    def task(self, description, total, done=0, work=None):
        return _Step(self.act if description == "quantizing blocks" and not done else lambda: None)


class _Step:
    def __init__(self, act):
        self.act, self.steps = act, 0

    def advance(self, steps=1):
        self.steps += 1
        if self.steps == 1:
            self.act()

    def done(self):
        pass


@pytest.fixture
def model(tmp_path):
    return in_two_shards(tmp_path / "model")


def run(model, output, act=lambda: None):
    return quern.quantize(model, output, recipe=small_recipe(), progress=After(act))


def blocks_done(output):
    return quern.status(output).jobs[0].blocks


def changed(shard):
    """One bit of the last weight flipped, which leaves it a number."""
    raw = bytearray(shard.read_bytes())
    raw[-2] ^= 1
    shard.write_bytes(bytes(raw))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_number_in_the_last_block_is_named_before_the_first_one_is_touched(model, tmp_path, value):
    weights = load_file(model / SECOND)
    weights["model.layers.2.mlp.down_proj.weight"][3, 5] = value
    save_file(weights, model / SECOND, metadata={"format": "pt"})
    with pytest.raises(
        BadFileError, match=rf"{SECOND}: tensor 'model.layers.2.mlp.down_proj.weight' holds 1 NaN or infinite"
    ):
        run(model, tmp_path / "out")
    (job,) = quern.status(tmp_path / "out").jobs
    assert (job.blocks, job.last_step) == (0, "started")


def test_a_shard_that_changes_on_the_way(model, tmp_path):
    run(model, tmp_path / "whole")
    shutil.copy2(model / SECOND, tmp_path / "kept")
    with pytest.raises(
        BadFileError, match=rf"{SECOND}: has changed since the checkpoint was opened: .*finished is kept"
    ):
        run(model, tmp_path / "out", lambda: changed(model / SECOND))
    assert blocks_done(tmp_path / "out") == 2, "the first shard holds two blocks"
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        BadFileError, match=rf"{SECOND}: has changed since the job in .*out.quern-work began.*fresh=True"
    ):
        run(model, tmp_path / "out")
    assert blocks_done(tmp_path / "out") == 2
    shutil.copyfile(tmp_path / "kept", model / SECOND)  # the same bytes at another time
    report = run(model, tmp_path / "out")
    assert report.resumed
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_shard_that_is_only_written_again_is_read_no_further_in_this_run(model, tmp_path):
    """Its bytes would have to be hashed again to know them for the same; the next run does that."""

    def rewritten():
        raw = (model / SECOND).read_bytes()
        (model / SECOND).unlink()
        (model / SECOND).write_bytes(raw)

    with pytest.raises(BadFileError, match=rf"{SECOND}: has changed"):
        run(model, tmp_path / "out", rewritten)
    assert run(model, tmp_path / "out").resumed


def test_a_shard_that_vanishes(model, tmp_path):
    kept = tmp_path / "kept"
    with pytest.raises(
        BadFileError, match=rf"{SECOND}: was there when the checkpoint was opened, and now: No such file"
    ):
        run(model, tmp_path / "out", lambda: shutil.move(model / SECOND, kept))
    assert blocks_done(tmp_path / "out") == 2
    with pytest.raises(BadFileError, match=f"names the shard '{SECOND}', which is missing"):
        run(model, tmp_path / "out")
    shutil.move(kept, model / SECOND)
    assert run(model, tmp_path / "out").resumed


def test_another_model_is_still_another_job(model, tmp_path):
    with pytest.raises(BadFileError):
        run(model, tmp_path / "out", lambda: changed(model / SECOND))
    other = write_model(tmp_path / "other", tiny_config())
    with pytest.raises(UserError, match="belongs to another job"):
        run(other, tmp_path / "out")
    config = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}), "utf-8")
    with pytest.raises(UserError, match="belongs to another job"):
        run(model, tmp_path / "out")


def test_starting_over_takes_the_weights_as_they_are(model, tmp_path):
    with pytest.raises(BadFileError):
        run(model, tmp_path / "out", lambda: changed(model / SECOND))
    report = quern.quantize(model, tmp_path / "out", recipe=small_recipe(), fresh=True)
    assert not report.resumed

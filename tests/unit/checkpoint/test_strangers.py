"""What is no checkpoint, or one of another shape: opened where it can be, else named with what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from bad_files import corpus
from safetensors.torch import load_file, save_file

from quern.checkpoint.checkpoint import open_checkpoint
from quern.checkpoint.tokenizer import copy_tokenizer, load_tokenizer
from quern.core.errors import UserError
from quern.loading.fitting import open_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 268435456\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    return corpus.good_folder(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path) -> Path:
    return corpus.sharded_folder(tmp_path / "model")


@pytest.mark.parametrize("name", ["config.json", corpus.SINGLE, corpus.INDEX])
def test_pointers_of_git_lfs_are_named(name, folder):
    if name == corpus.INDEX:
        (folder / corpus.SINGLE).unlink()
    (folder / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{name}: is only a pointer of git-lfs.*`git lfs pull`"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_so_are_those_among_the_tokenizers_files(name, folder, tmp_path):
    (folder / name).write_text(POINTER)
    for use in (load_tokenizer, lambda path: copy_tokenizer(path, tmp_path)):
        with pytest.raises(UserError, match=f"{name}: is only a pointer of git-lfs"):
            use(folder)


def test_a_configuration_that_counts_for_ever_keeps_no_tokenizer_waiting(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2**53}))
    with pytest.raises(UserError, match="num_hidden_layers 9007199254740992; it must be an integer from 1"):
        load_tokenizer(folder)


def test_a_gguf_may_be_one_too(tmp_path):
    (tmp_path / "m.gguf").write_text(POINTER)
    with pytest.raises(UserError, match=r"m\.gguf: is only a pointer of git-lfs"):
        open_checkpoint(tmp_path / "m.gguf")


def test_shards_without_their_index_are_opened(sharded):
    before = open_checkpoint(sharded)
    (sharded / corpus.INDEX).unlink()
    after = open_model(sharded)
    assert after.names() == before.names()
    assert all(torch.equal(after.read(name), before.read(name)) for name in after.names())


@pytest.mark.parametrize("index", [True, False])
def test_missing_shards_are_named(index, sharded):
    (sharded / corpus.SHARDS[1]).unlink()
    if not index:
        (sharded / corpus.INDEX).unlink()
    with pytest.raises(UserError, match=rf"{corpus.SHARDS[1]}.*Download the missing files"):
        open_checkpoint(sharded)


def test_all_missing_shards_are_named_at_once(folder):
    shutil.move(folder / corpus.SINGLE, folder / "model-00003-of-00020.safetensors")
    with pytest.raises(UserError, match=r"lacks the shards 'model-00001-of-00020.*00006-of.* and 14 more of 20"):
        open_checkpoint(folder)


def test_shards_of_two_models_are_told_apart(sharded):
    (sharded / corpus.INDEX).unlink()
    shutil.copy(sharded / corpus.SHARDS[0], sharded / "other.safetensors")
    with pytest.raises(UserError, match=rf"other\.safetensors: holds tensor .* which {corpus.SHARDS[0]} holds too"):
        open_checkpoint(sharded)


def test_a_tensor_in_two_shards_is_refused_though_an_index_places_it(sharded):
    tensors = load_file(sharded / corpus.SHARDS[1])
    name, value = next(iter(load_file(sharded / corpus.SHARDS[0]).items()))
    save_file({**tensors, name: value}, sharded / corpus.SHARDS[1])
    with pytest.raises(UserError, match=rf"does not place tensor '{name}' in {corpus.SHARDS[1]}, which holds it"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("extra", ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors"])
def test_mistrals_own_copy_beside_the_weights_does_not_matter(extra, sharded):
    (sharded / corpus.INDEX).unlink()
    shutil.copy(sharded / corpus.SHARDS[0], sharded / extra)
    assert open_model(sharded).parameters == open_model(corpus.good_folder(sharded.parent / "single")).parameters


def lora(folder: Path, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    save_file({"base_model.model.lora_A.weight": torch.zeros(8, 128)}, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_names_its_base_and_how_to_merge(tmp_path):
    with pytest.raises(UserError, match=r"is a LORA adapter of org/base, not a model\. Merge .*merge_and_unload"):
        open_checkpoint(lora(tmp_path / "adapter", base_model_name_or_path="org/base"))


@pytest.mark.parametrize("base", [None, 3, "a\nb", "x" * 400])
def test_an_adapter_that_does_not_say_its_base(base, tmp_path):
    with pytest.raises(UserError, match="is a LORA adapter of a model that it does not name"):
        open_checkpoint(lora(tmp_path / "adapter", base_model_name_or_path=base))


def test_an_adapter_beside_a_configuration_is_one_too(folder):
    (folder / corpus.SINGLE).unlink()
    with pytest.raises(UserError, match="LORA adapter of org/base"):
        open_checkpoint(lora(folder, base_model_name_or_path="org/base"))


def test_an_adapter_beside_whole_weights_does_not_matter(folder):
    assert open_model(lora(folder)).parameters


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("consolidated.safetensors", "Mistral's own format"),
        ("pytorch_model.bin", "a pickle"),
        ("pytorch_model.bin.index.json", "a pickle"),
        ("consolidated.00.pth", "a pickle"),
        ("flax_model.msgpack", "a file of Flax"),
        ("tf_model.h5", "a file of TensorFlow"),
        ("some-Q4_K_M.gguf", "give that file as MODEL"),
    ],
)
def test_weights_in_other_formats_are_named(name, says, folder):
    (folder / corpus.SINGLE).rename(folder / name)
    with pytest.raises(UserError, match=says):
        open_checkpoint(folder)


def test_a_folder_of_folders_names_one_that_holds_a_model(tmp_path):
    corpus.good_folder(tmp_path / "checkpoint-100")
    with pytest.raises(UserError, match=rf"give {tmp_path / 'checkpoint-100'} as MODEL"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", corpus.SINGLE, "tokenizer.json"])
def test_one_file_of_a_model_names_its_folder(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for path in (folder / name, name):
        with pytest.raises(UserError, match=rf"{name} is one file of a model\. Give the folder .*: {folder}$"):
            open_checkpoint(path)


def cache(folder: Path, *snapshots: str, main: str | None = None) -> Path:
    """What the Hub's client keeps of a model: ``models--Organization--Name``."""
    root = folder / "models--Org--Name"
    for snapshot in snapshots:
        corpus.good_folder(root / "snapshots" / snapshot)
    (root / "snapshots").mkdir(parents=True, exist_ok=True)
    if main is not None:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(main)
    return root


def test_a_cache_of_the_hub_is_its_snapshot(tmp_path):
    root = cache(tmp_path, "aaaa", "bbbb", main="bbbb")
    assert open_checkpoint(root).path == root / "snapshots" / "bbbb"
    (root / "refs" / "main").unlink()
    shutil.rmtree(root / "snapshots" / "bbbb")
    assert open_checkpoint(root).path == root / "snapshots" / "aaaa"


@pytest.mark.parametrize("main", [None, "../aaaa", "", "cccc", "x" * 300])
def test_several_snapshots_without_a_main_one_are_named(main, tmp_path):
    root = cache(tmp_path, "aaaa", "bbbb", main=main)
    with pytest.raises(UserError, match=rf"2 snapshots\. Give one of them as MODEL: {root}/snapshots/aaaa"):
        open_checkpoint(root)


def test_a_cache_without_a_snapshot_is_refused(tmp_path):
    with pytest.raises(UserError, match="without a snapshot"):
        open_checkpoint(cache(tmp_path))

"""A folder as a checkpoint: what it counts, hashes, reads and compares."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from bad_files import corpus
from safetensors.torch import save_file

from quern.checkpoint.checkpoint import count_non_finite, open_checkpoint
from quern.core.errors import BadFileError, UserError

STORED = sum(torch.Size(shape).numel() for shape in corpus.expected_shapes().values())


class Listener:
    """Adds up what a progress bar is told."""

    def __init__(self) -> None:
        self.total = 0.0
        self.advanced = 0.0
        self.finished = 0

    def task(self, description, total, done=0, work=None):
        self.total = total
        return self

    def log(self, message):
        pass

    def advance(self, steps=1):
        self.advanced += steps

    def done(self):
        self.finished += 1


@pytest.fixture
def single(tmp_path):
    return corpus.good_folder(tmp_path / "single")


@pytest.fixture
def sharded(tmp_path):
    return corpus.sharded_folder(tmp_path / "sharded")


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_reads_what_was_saved(kind, request):
    checkpoint = open_checkpoint(str(request.getfixturevalue(kind)))
    tensors = corpus.weights()
    assert checkpoint.model_type == "llama"
    assert checkpoint.config == corpus.CONFIG
    assert checkpoint.names() == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name, finite=True), tensor)
        assert checkpoint.info(name).shape == tuple(tensor.shape)


def test_only_the_tensor_asked_for_is_read(sharded):
    """A shard whose data was damaged after opening does not matter to the tensors of the other."""
    checkpoint = open_checkpoint(sharded)
    (sharded / corpus.SHARDS[1]).write_bytes(b"")
    first, second = (
        next(name for name in checkpoint.names() if checkpoint.source.place(name).name == shard)
        for shard in corpus.SHARDS
    )
    assert checkpoint.read(first).numel()
    with pytest.raises(BadFileError, match=corpus.SHARDS[1]):
        checkpoint.read(second)


def test_counts_of_a_bf16_folder_are_its_own_size(single):
    checkpoint = open_checkpoint(single)
    assert checkpoint.parameters == STORED
    assert checkpoint.bf16_bytes == sum(path.stat().st_size for path in single.iterdir())


def test_counts_of_a_float32_folder_are_those_of_two_bytes_a_weight(single):
    save_file(corpus.weights(torch.float32), single / corpus.SINGLE)
    checkpoint = open_checkpoint(single)
    assert checkpoint.parameters == STORED
    assert checkpoint.bf16_bytes == sum(path.stat().st_size for path in single.iterdir()) - 2 * STORED


def test_files_that_belong_to_nothing_do_not_count(single):
    before = open_checkpoint(single).bf16_bytes
    (single / "README.md").write_text("x" * 1000)
    (single / "pytorch_model.bin").write_text("x" * 1000)
    assert open_checkpoint(single).bf16_bytes == before


def tied_folder(folder: Path, head: torch.Tensor | None) -> Path:
    corpus.good_folder(folder)
    tensors = corpus.weights()
    del tensors["lm_head.weight"]
    if head is not None:
        tensors["lm_head.weight"] = head
    save_file(tensors, folder / corpus.SINGLE)
    (folder / "config.json").write_text(json.dumps({**corpus.CONFIG, "tie_word_embeddings": True}))
    return folder


def test_a_tied_head_counts_once_wherever_it_is_stored(tmp_path):
    embedding = corpus.weights()[corpus.EMBEDDING]
    one = open_checkpoint(tied_folder(tmp_path / "one", None))
    two = open_checkpoint(tied_folder(tmp_path / "two", embedding.clone()))
    assert one.parameters == two.parameters == STORED - embedding.numel()


def test_hash_depends_on_config_weights_and_names_only(single, tmp_path):
    listener = Listener()
    checkpoint = open_checkpoint(single)
    first = checkpoint.sha256(listener)
    size = sum((single / name).stat().st_size for name in ("config.json", corpus.SINGLE))
    assert (listener.total, listener.advanced, listener.finished) == (size, size, 1)
    digest = hashlib.sha256()
    for name in ("config.json", corpus.SINGLE):
        raw = (single / name).read_bytes()
        digest.update(f"{name}\0{len(raw)}\0".encode() + raw)
    assert first == digest.hexdigest()
    (single / "README.md").write_text("x")
    assert open_checkpoint(single.rename(tmp_path / "elsewhere")).sha256() == first
    raw = bytearray((tmp_path / "elsewhere" / corpus.SINGLE).read_bytes())
    raw[-1] ^= 1
    (tmp_path / "elsewhere" / corpus.SINGLE).write_bytes(raw)
    assert open_checkpoint(tmp_path / "elsewhere").sha256() != first


def test_a_tensor_that_is_not_there_is_named(single):
    checkpoint = open_checkpoint(single)
    for use in (checkpoint.info, checkpoint.read):
        with pytest.raises(BadFileError, match=r"no tensor 'other\.weight'"):
            use("other.weight")


def test_a_window_that_is_switched_off_may_be_any(single):
    config = json.loads((single / "config.json").read_text())
    for off in ({"sliding_window": None}, {"sliding_window": 0, "use_sliding_window": False}):
        (single / "config.json").write_text(json.dumps({**config, **off}))
        open_checkpoint(single)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("num_hidden_layers", 2**31 - 1, "num_hidden_layers 2147483647; it must be an integer from 1 to 65536"),
        ("num_hidden_layers", 1000, r"has 1000 layers, its weights \d+ tensors"),
        ("head_dim", 2**31, "head_dim 2147483648"),
        ("hidden_size", 0, "hidden_size 0"),
        ("vocab_size", "300", "vocab_size 300"),
        ("vocab_size", True, "vocab_size True"),
        ("intermediate_size", None, "intermediate_size None"),
        ("max_position_embeddings", -1, "max_position_embeddings -1"),
        ("sliding_window", 0, "sliding_window 0; it must be an integer from 1"),
    ],
)
def test_counts_that_no_model_has_are_refused_before_anything_loops_over_them(key, value, match, single):
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(BadFileError, match=match):
        open_checkpoint(single)


def test_links_to_shards_are_followed(sharded, tmp_path):
    """The Hub's cache is a folder of links."""
    (tmp_path / "blobs").mkdir()
    for shard in corpus.SHARDS:
        (sharded / shard).rename(tmp_path / "blobs" / shard)
        (sharded / shard).symlink_to(tmp_path / "blobs" / shard)
    assert len(open_checkpoint(sharded).names()) == len(corpus.expected_shapes())


@pytest.mark.parametrize("model", ["", "  ", "nowhere/at/all", "a b", "./nothing", "nothing.gguf"])
def test_what_is_no_model_is_refused_with_what_is_allowed(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"Give a Hugging Face folder.*Hub id.*\.gguf"):
        open_checkpoint(model)


def test_a_folder_with_only_a_gguf_names_it(tmp_path):
    (tmp_path / "some.gguf").write_text("")
    with pytest.raises(UserError, match=r"some\.gguf: give that file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2, torch.float8_e4m3fn]
)
def test_non_finite_values_are_counted_in_every_dtype(dtype):
    assert count_non_finite(torch.ones(5).to(dtype)) == 0
    assert count_non_finite(torch.zeros(0, dtype=dtype)) == 0
    values = torch.ones(5, 7).to(dtype)
    values[1, 2] = float("nan")
    assert count_non_finite(values) == 1
    if dtype != torch.float8_e4m3fn:  # which has no infinity
        values[3, 3] = -float("inf")
        assert count_non_finite(values) == 2


def test_a_large_float64_is_finite_and_integers_always_are():
    assert count_non_finite(torch.tensor([1e300], dtype=torch.float64)) == 0
    assert count_non_finite(torch.tensor([2**62])) == 0


def test_counting_works_in_pieces():
    values = torch.zeros((1 << 22) + 3)
    values[-1] = values[0] = float("nan")
    assert count_non_finite(values) == 2

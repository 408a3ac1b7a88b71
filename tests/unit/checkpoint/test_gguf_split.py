"""A model in several GGUF files: whichever is given opens the whole, and lies of one about the others are found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from gguf_model import tensor_count, write_gguf
from tiny_model import tiny_config, write_model

from quern.checkpoint.gguf.split import read_parts
from quern.checkpoint.tokenizer import load_tokenizer
from quern.core.errors import BadFileError
from quern.engines.base import ENGINES
from quern.generation.generate import generate
from quern.loading.fitting import open_model
from quern.pipeline.inspect import inspect


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    config = tiny_config("llama", torch_dtype="float32", attention_bias=False)
    return write_model(tmp_path_factory.mktemp("split") / "model", config)


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    return write_gguf(folder, folder.parent / "whole.gguf")[0]


@pytest.fixture(params=["three parts", "a first part without tensors", "a last part without tensors"])
def parts(request, folder, tmp_path) -> list[Path]:
    count = tensor_count(folder)
    sizes = {"three parts": [3, 10, count - 13], "a first part without tensors": [0, count]}
    return write_gguf(folder, tmp_path / "m", parts=sizes.get(request.param, [count, 0]))


def test_any_part_is_the_whole_model(parts, folder, whole):
    single = open_model(whole)
    for part in parts:
        model = open_model(part)
        assert (model.path, model.files) == (parts[0], tuple(parts))
        assert model.config == single.config
        assert model.names() == single.names()
        assert all(torch.equal(model.read(name), single.read(name)) for name in model.names())
        assert model.sha256() == open_model(parts[0]).sha256()
        assert load_tokenizer(model.path)("def f").input_ids == load_tokenizer(folder)("def f").input_ids


def test_any_part_runs_in_every_engine(parts, folder):
    ids = torch.tensor([[1, 5, 17, 40, 95]])
    for engine in ENGINES.names():
        expected = ENGINES.get(engine)().load(folder).logits(ids)
        assert torch.equal(ENGINES.get(engine)().load(parts[-1]).logits(ids), expected)
    assert list(generate(parts[-1], "def f", max_tokens=4)) == list(generate(folder, "def f", max_tokens=4))


def test_inspect_counts_all_parts(parts, whole):
    found, single = inspect(parts[-1]), inspect(whole)
    assert found.bytes == sum(part.stat().st_size for part in parts)
    assert (found.parameters, found.tensors) == (single.parameters, single.tensors)


def test_missing_parts_are_named(folder, tmp_path):
    written = write_gguf(folder, tmp_path / "m", parts=[1] * (tensor_count(folder) - 1) + [1])
    for part in (written[0], *written[3:9]):
        part.unlink()
    with pytest.raises(BadFileError, match=r"m-00001-of-\d+\.gguf, m-00004-of-\d+\.gguf.* and 2 more is missing"):
        open_model(written[1])


@pytest.mark.parametrize("name", ["other.gguf", "m-00002-of-00003.gguf", "m-00001-of-00002.gguf"])
def test_a_part_under_another_name_is_refused(name, folder, tmp_path):
    first, *_ = write_gguf(folder, tmp_path / "m", parts=[1, 1, tensor_count(folder) - 2])
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(BadFileError, match=r"is part 1 of 3, and its name must end in -00001-of-00003\.gguf"):
        open_model(shutil.copy(first, tmp_path / "elsewhere" / name))


def test_parts_of_another_split_are_refused(folder, tmp_path):
    count = tensor_count(folder)
    ours = write_gguf(folder, tmp_path / "m", parts=[2, count - 2])
    other = write_gguf(folder, tmp_path / "o", parts=[3, count - 3])
    shutil.copy(other[1], ours[1])
    with pytest.raises(BadFileError, match=rf"all parts hold {count} tensors; they hold {count - 1}"):
        open_model(ours[0])
    shutil.copy(other[0], ours[0])
    shutil.copy(write_gguf(folder, tmp_path / "p", parts=[2, count - 2])[1], ours[1])
    with pytest.raises(BadFileError, match=r"m-00002.*holds tensor .* again, which m-00001-of-00002\.gguf holds too"):
        open_model(ours[0])
    shutil.copy(ours[0], ours[1])
    with pytest.raises(BadFileError, match=r"m-00002-of-00002\.gguf: says that it is part 1 of 2, unlike its name"):
        open_model(ours[0])


def test_a_file_that_only_looks_like_a_part_is_whole(whole, tmp_path):
    path = shutil.copy(whole, tmp_path / "m-00001-of-00002.gguf")
    assert read_parts(path).paths == (path,)
    assert open_model(path).names() == open_model(whole).names()

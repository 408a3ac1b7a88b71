"""A GGUF in parts of a size: what lies in them, and that nothing opens before all of them are there."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import pytest
import torch
from artifacts import small_recipe
from gguf_model import write_gguf
from tiny_model import tiny_config, write_model

from quern.checkpoint.gguf.header import read_gguf_header
from quern.checkpoint.gguf.split import read_parts
from quern.checkpoint.jobs import publishing
from quern.checkpoint.tokenizer import load_tokenizer
from quern.core.errors import BadFileError, UserError
from quern.engines.base import ENGINES
from quern.loading.fitting import open_model
from quern.pipeline.export import export
from quern.pipeline.quantize import quantize

RECIPE = small_recipe(weights={"bits": 4, "group_size": 32})
SIZE = 24_000
OPTIONS = {"shard-size": f"{SIZE}B"}
IDS = torch.randint(0, 296, (1, 9), generator=torch.Generator().manual_seed(3))


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("parts") / "model", tiny_config("llama", tie_word_embeddings=False))


def make(model: Path, output: Path, **given: object):
    return quantize(model, output, recipe=RECIPE, format="gguf", threads=1, **{"format_options": OPTIONS, **given})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_parts_hold_what_one_file_holds(model, tmp_path):
    whole = make(model, tmp_path / "whole.gguf", format_options={})
    report = make(model, tmp_path / "x.gguf")
    parts = read_parts(report.path)
    count = len(parts.paths)
    assert report.path == tmp_path / f"x-00001-of-{count:05d}.gguf"
    assert names(tmp_path) == sorted(["whole.gguf", *(path.name for path in parts.paths)])
    assert count > 3
    assert report.bytes == sum(path.stat().st_size for path in parts.paths)
    assert report.bits_per_weight == whole.bits_per_weight
    single = {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(tmp_path / "whole.gguf").tensors}
    split = [tensor for path in parts.paths for tensor in gguf.GGUFReader(path).tensors]
    assert [tensor.name for tensor in split] == list(single)
    assert all(tensor.data.tobytes() == single[tensor.name] for tensor in split)
    for path in parts.paths:
        assert path.stat().st_size <= SIZE or len(read_gguf_header(path).tensors) == 1
    fields = [gguf.GGUFReader(path).fields for path in parts.paths]
    kinds = {key: fields[0][key].types for key in ("split.no", "split.count", "split.tensors.count")}
    kind = gguf.GGUFValueType
    assert kinds == {"split.no": [kind.UINT16], "split.count": [kind.UINT16], "split.tensors.count": [kind.INT32]}
    assert "tokenizer.ggml.tokens" in fields[0]
    assert "tokenizer.ggml.tokens" not in fields[1]
    engine = ENGINES.get("reference")()
    assert torch.equal(
        engine.load(report.path, dtype="float32").logits(IDS), engine.load(whole.path, dtype="float32").logits(IDS)
    )
    assert load_tokenizer(report.path).encode("a b") == load_tokenizer(model).encode("a b")


def test_finished_already_replaced_and_in_the_way(model, tmp_path):
    first = make(model, tmp_path / "x.gguf")
    assert make(model, tmp_path / "x.gguf").seconds is None
    with pytest.raises(UserError, match=r"holds the result of another job[\s\S]*shard-size: \"24000B\" -> \"50KB\""):
        make(model, tmp_path / "x.gguf", format_options={"shard-size": "50KB"})
    second = make(model, tmp_path / "x.gguf", format_options={"shard-size": "50KB"}, fresh=True)
    assert names(tmp_path) == sorted(path.name for path in read_parts(second.path).paths)
    assert second.path != first.path
    assert make(model, tmp_path / "x.gguf", format_options={}, fresh=True).path == tmp_path / "x.gguf"
    assert names(tmp_path) == ["x.gguf"]
    make(model, tmp_path / "x.gguf", fresh=True)
    assert not (tmp_path / "x.gguf").exists()


def test_parts_of_others_are_left_alone(model, tmp_path):
    name = make(model, tmp_path / "probe" / "x.gguf").path.name
    theirs = tmp_path / name.replace("00001-of", "00002-of")
    theirs.write_bytes(b"mine")
    with pytest.raises(UserError, match="already exists. Remove it or choose another output; the work is kept"):
        make(model, tmp_path / "x.gguf")
    assert theirs.read_bytes() == b"mine"
    theirs.unlink()
    assert make(model, tmp_path / "x.gguf").resumed


def test_one_file_suffices_where_all_fits(model, tmp_path):
    report = make(model, tmp_path / "x.gguf", format_options={"shard-size": "1GB"})
    assert names(tmp_path) == ["x.gguf"] == [report.path.name]
    assert "split.count" not in read_gguf_header(report.path).metadata


def test_a_size_that_is_none(model, tmp_path):
    for size in ("24000", "none", "0B"):
        with pytest.raises(UserError, match="shard-size"):
            make(model, tmp_path / "x.gguf", format_options={"shard-size": size})


def test_exported_too(model, tmp_path):
    report = export(model, tmp_path / "x.gguf", format_options={"shard-size": "40KB"})
    assert report.path.name.startswith("x-00001-of-")
    assert report.bytes == sum(path.stat().st_size for path in read_parts(report.path).paths)
    assert export(model, tmp_path / "x.gguf", format_options={"shard-size": "40KB"}).seconds is None
    (source,) = write_gguf(model, tmp_path / "source.gguf")
    open_model(source)


@pytest.mark.parametrize("older", [False, True])
def test_killed_at_any_move_it_goes_on_and_nothing_opens_before(older, model, tmp_path, monkeypatch):
    """Before each move of a part, and of an older model's parts away."""
    output = tmp_path / "x.gguf"
    expected = make(model, tmp_path / "other" / "x.gguf", format_options={"shard-size": "50KB"})
    whole = {path.name: path.read_bytes() for path in read_parts(expected.path).paths}
    given = {"format_options": {"shard-size": "50KB"}}
    for step in range(12):
        for name in names(tmp_path):
            if (path := tmp_path / name).is_file():
                path.unlink()
        if older:
            make(model, output)
        killed = _killed_at(step, model, output, monkeypatch, {**given, "fresh": older})
        there = {name for name in names(tmp_path) if name.endswith(".gguf")}
        still = older and step == 0  # nothing of the older model was touched
        if killed and not still and whole.keys() != there:
            for name in there:
                with pytest.raises(BadFileError, match="missing beside it"):
                    open_model(tmp_path / name)
        report = make(model, output, **given, fresh=still)
        assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path) if name != "other"} == whole
        assert report.path.name == expected.path.name
        if not killed:
            return
    raise AssertionError("the publication has more steps than were tried")


def _killed_at(step: int, model: Path, output: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, object]) -> bool:
    """Whether the run came to the move or removal of that number, at which it is stopped."""
    count = 0

    def counted(then):
        def stopping(*arguments):
            nonlocal count
            count += 1
            if count > step:
                raise Killed
            return then(*arguments)

        return stopping

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "_move", counted(publishing._move))
        patch.setattr(publishing, "remove_entry", counted(publishing.remove_entry))
        try:
            make(model, output, **given)
        except Killed:
            assert os.path.isdir(f"{output}.quern-work")
            return True
    return False

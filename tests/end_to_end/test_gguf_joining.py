"""Finished stages move into a GGUF one by one: what is moved is gone, and a kill at any moment costs the stage in hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from artifacts import small_recipe
from tiny_model import tiny_config, write_model

from quern.checkpoint.gguf.split import read_parts
from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.core.errors import UserError
from quern.formats.writing import joined
from quern.pipeline.blockwise.disk_plan import folder_bytes
from quern.pipeline.export import export
from quern.pipeline.quantize import quantize

RECIPE = small_recipe(weights={"bits": 4, "group_size": 32})
OPTIONS = {"one file": {}, "parts": {"shard-size": "24000B"}}


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("joining") / "model", tiny_config("llama", tie_word_embeddings=False))


def quantized(model: Path, output: Path, options: dict[str, str]):
    return quantize(model, output, recipe=RECIPE, format="gguf", threads=1, format_options=options)


def exported(model: Path, output: Path, options: dict[str, str]):
    return export(model, output, format_options=options)


def content(path: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in read_parts(path).paths}


def stopped_after(calls: int, method: str, monkeypatch: pytest.MonkeyPatch, owner: object):
    """Lets so many calls through, whole; the next one does what it does and then is killed."""
    then, count = getattr(owner, method), Counter[str]()

    def counted(*given):
        count[method] += 1
        found = then(*given)
        if count[method] > calls:
            raise Killed
        return found

    monkeypatch.setattr(owner, method, counted)


# How many calls each run comes to the end of; with five stages, the last run is killed when all have moved.
@pytest.mark.parametrize(
    ("owner", "method", "runs"), [(joined, "append_tensor", (0, 3)), (WorkFolder, "grow", (0, 1, 0, 0))]
)
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("make", [quantized, exported])
def test_killed_in_a_stage_or_after_one_it_goes_on_to_the_same_bytes(
    make, kind, owner, method, runs, model, tmp_path, monkeypatch
):
    expected = content(make(model, tmp_path / "other" / "x.gguf", OPTIONS[kind]).path)
    output = tmp_path / "x.gguf"
    for calls in runs:
        with monkeypatch.context() as patch:
            stopped_after(calls, method, patch, owner)
            with pytest.raises(Killed):
                make(model, output, OPTIONS[kind])
        assert not list(tmp_path.glob("*.gguf"))
    assert content(make(model, output, OPTIONS[kind]).path) == expected
    assert not list(tmp_path.glob("x.gguf.*"))


def test_what_has_moved_is_gone(model, tmp_path, monkeypatch):
    sizes = []
    grow = WorkFolder.grow

    def seen(work, *given):
        grow(work, *given)
        stages = [path.stat().st_size for path in sorted((work.folder / "stages").iterdir())]
        sizes.append((folder_bytes(work.folder), len(stages), stages[0]))

    monkeypatch.setattr(WorkFolder, "grow", seen)
    size = quantized(model, tmp_path / "x.gguf", {}).bytes
    assert [left for _, left, _ in sizes] == [5, 4, 3, 2, 1], "an embedding, three blocks and the head"
    largest = max(stage for _, _, stage in sizes)
    assert max(folder for folder, _, _ in sizes) < size + largest + 30_000, "and the journal"


@pytest.mark.parametrize("lost", ["stages", "artifact"])
def test_what_is_lost_is_told(lost, model, tmp_path, monkeypatch):
    output = tmp_path / "x.gguf"
    with monkeypatch.context() as patch:
        stopped_after(1, "grow", patch, WorkFolder)
        with pytest.raises(Killed):
            quantized(model, output, {})
    for path in (tmp_path / "x.gguf.quern-work" / lost).iterdir():
        path.unlink()
    with pytest.raises(
        UserError, match=r"work folder .* lost what 0000\d.safetensors held. Start over with fresh=True"
    ):
        quantized(model, output, {})
    assert quantize(model, output, recipe=RECIPE, format="gguf", threads=1, fresh=True).bytes == output.stat().st_size


def test_kept_when_the_place_is_taken(model, tmp_path):
    """Stages are gone by then, and the parts are what is left of the work."""
    name = quantized(model, tmp_path / "probe" / "x.gguf", OPTIONS["parts"]).path.name
    expected = content(tmp_path / "probe" / name)
    theirs = tmp_path / name.replace("00001-of", "00002-of")
    for _ in range(2):
        theirs.write_bytes(b"mine")
        with pytest.raises(UserError, match="already exists. Remove it or choose another output; the work is kept"):
            quantized(model, tmp_path / "x.gguf", OPTIONS["parts"])
    theirs.unlink()
    report = quantized(model, tmp_path / "x.gguf", OPTIONS["parts"])
    assert report.resumed
    assert content(report.path) == expected

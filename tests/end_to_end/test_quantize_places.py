"""The main job into places that nothing can be renamed onto, and ``--fresh`` among files of the user's."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from artifacts import small_recipe
from mounts import read_only, tmpfs

from quern.core.errors import UserError
from quern.pipeline import quantize as job
from quern.pipeline.blockwise import disk_plan
from quern.pipeline.quantize import quantize

NEAREST = small_recipe(weights={"bits": 4, "group_size": 32}, rounding={"method": "nearest"})
OTHER = small_recipe(weights={"bits": 3, "group_size": 32}, rounding={"method": "nearest"})


def hashes(folder: Path) -> dict[str, str]:
    """The files directly in ``folder``."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def expected(tiny_model, tmp_path_factory) -> dict[str, str]:
    return hashes(quantize(tiny_model, tmp_path_factory.mktemp("whole") / "out", recipe=NEAREST, threads=1).path)


@pytest.fixture
def never_opened(monkeypatch):
    """Whoever reads the model has begun the work."""

    def opened(*_, **__):
        raise AssertionError("the model was opened")

    monkeypatch.setattr(job, "open_original", opened)


def test_an_empty_folder_that_someone_stands_in_is_kept(tiny_model, tmp_path, monkeypatch, expected):
    (tmp_path / "out").mkdir(mode=0o750)
    monkeypatch.chdir(tmp_path / "out")
    before = os.stat(".").st_ino
    quantize(tiny_model, ".", recipe=NEAREST, threads=1)
    assert os.stat(tmp_path / "out").st_ino == before
    assert hashes(Path(".")) == expected
    assert quantize(tiny_model, ".", recipe=NEAREST, threads=1).notes == ["was finished already"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_to_another_folder(tiny_model, tmp_path, expected, exists):
    (tmp_path / "disk").mkdir()
    if exists:
        (tmp_path / "disk" / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    report = quantize(tiny_model, tmp_path / "out", recipe=NEAREST, threads=1)
    assert report.path == tmp_path / "out"
    assert (tmp_path / "out").is_symlink()
    assert hashes(tmp_path / "disk" / "real") == expected
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


@pytest.mark.parametrize("name", ["x" * 255, "two\nlines", "~x", " ", "new/er/out", "model/inside"])
def test_odd_names(tiny_model, tmp_path, monkeypatch, expected, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, tmp_path / "model")
    for _ in range(2):
        quantize("model", name, recipe=NEAREST, threads=1)
    assert hashes(tmp_path / name) == expected
    assert list(tmp_path.rglob("*.quern-*")) == []


def test_a_volume_in_a_read_only_folder(tiny_model, tmp_path, expected):
    """As in a container: only the mounted folder can be written, and it cannot be renamed."""
    volume = tmp_path / "root" / "volume"
    volume.mkdir(parents=True)
    with read_only(tmp_path / "root"), tmpfs(volume):
        (volume / "lost+found").mkdir()
        report = quantize(tiny_model, volume, recipe=NEAREST, threads=1)
        assert report.bytes == sum(path.stat().st_size for path in volume.iterdir() if path.is_file())
        assert hashes(volume) == expected
        assert quantize(tiny_model, volume, recipe=NEAREST, threads=1).resumed
        other = quantize(tiny_model, volume, recipe=OTHER, threads=1, fresh=True)
        assert not other.resumed
        assert hashes(volume) != expected
        quantize(tiny_model, volume, recipe=NEAREST, threads=1, fresh=True)
        assert hashes(volume) == expected
        assert {path.name for path in volume.iterdir()} == {*expected, "lost+found"}


def test_a_volume_that_is_too_small_keeps_the_work_for_a_larger_one(tiny_model, tmp_path, expected, monkeypatch):
    needed = sum(path.stat().st_size for path in tiny_model.iterdir())
    with tmpfs(tmp_path / "volume", "128k") as volume:
        with monkeypatch.context() as unforeseen:
            unforeseen.setattr(disk_plan, "check", lambda job: None)
            unforeseen.setattr(disk_plan.DiskWatch, "before", lambda watch, index: None)
            with pytest.raises(UserError, match=r"not enough room to write .*what is finished is kept"):
                quantize(tiny_model, volume, recipe=NEAREST, threads=1)
        assert [path.name for path in volume.iterdir()] == [".quern-work"]
        os.system(f"mount -o remount,size={2 * needed + (1 << 20)} {volume}")
        assert quantize(tiny_model, volume, recipe=NEAREST, threads=1).resumed
        assert hashes(volume) == expected


def test_places_that_cannot_be_written_are_said_before_the_model_is_read(tiny_model, tmp_path, never_opened):
    (tmp_path / "locked").mkdir()
    said = pytest.raises(UserError, match="cannot write .*Read-only file system")
    with read_only(tmp_path / "locked") as locked, said:
        quantize(tiny_model, locked / "out", recipe=NEAREST)


def test_what_must_not_be_written_is_said_before_the_model_is_read(tiny_model, tmp_path, never_opened):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, said in {"out": "not an artifact of quern", "file": "is no folder"}.items():
        with pytest.raises(UserError, match=said):
            quantize(tiny_model, tmp_path / name, recipe=NEAREST, fresh=True)
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    before = hashes(copy)
    with pytest.raises(UserError, match="is the model itself"):
        quantize(copy, f"{copy}/", recipe=NEAREST, fresh=True)
    assert hashes(copy) == before


def test_fresh_deletes_nothing_of_the_users(tiny_model, tmp_path, expected):
    out = tmp_path / "out"
    quantize(tiny_model, out, recipe=NEAREST, threads=1)
    (out / "README.md").write_text("mine")
    (out / "runs").mkdir()
    with pytest.raises(UserError, match=r"holds 'README.md' and 1 more, which quern did not write. Move it away"):
        quantize(tiny_model, out, recipe=OTHER, threads=1, fresh=True)
    assert (out / "README.md").read_text() == "mine"
    assert quantize(tiny_model, out, recipe=NEAREST, threads=1).resumed, "found done, whatever lies beside it"
    (out / "README.md").unlink()
    (out / "runs").rmdir()
    quantize(tiny_model, out, recipe=OTHER, threads=1, fresh=True)
    assert not (tmp_path / "out.quern-work").exists()


def test_an_old_artifact_stays_until_the_new_one_is_whole(tiny_model, tmp_path, monkeypatch, expected):
    out = tmp_path / "out"
    quantize(tiny_model, out, recipe=NEAREST, threads=1)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "_write_metadata", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model, out, recipe=OTHER, threads=1, fresh=True)
    monkeypatch.undo()
    assert hashes(out) == expected
    quantize(tiny_model, out, recipe=OTHER, threads=1, fresh=True)
    assert {path.name for path in out.iterdir()} == set(expected)


def test_a_publication_stopped_among_its_files_is_finished(tiny_model, tmp_path, monkeypatch, expected):
    out = tmp_path / "out"
    out.mkdir()
    real, left = os.rename, [3]

    def rename(source, target):
        if Path(target).parent == out and ".quern-probe" not in str(target):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model, out, recipe=NEAREST, threads=1)
    monkeypatch.undo()
    assert len([path for path in out.iterdir() if path.is_file()]) == 3
    assert not (out / "config.json").exists()
    report = quantize(tiny_model, out, recipe=NEAREST, threads=1)
    assert report.layers
    assert hashes(out) == expected

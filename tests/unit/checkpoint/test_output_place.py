"""Where output may go: tried before the work, links followed, mount points filled from inside."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from mounts import mounted, read_only, tmpfs

from quern.checkpoint.jobs.output_place import BESIDE, output_file, output_folder, resolved, write_output
from quern.core.errors import UserError


def nothing_is_ours(path: Path) -> bool:
    return False


def everything_is_ours(path: Path) -> bool:
    return True


# Folders


def test_a_folder_that_does_not_exist_appears_by_a_rename(tmp_path):
    place = output_folder(tmp_path / "out").tried()
    assert (place.path, place.work) == (tmp_path / "out", tmp_path / f"out{BESIDE}")
    assert not place.inside
    deep = output_folder(tmp_path / "a" / "b" / "out").tried()
    assert deep.work == tmp_path / "a" / "b" / f"out{BESIDE}"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_filled_from_inside(tmp_path):
    place = output_folder(tmp_path).tried()
    assert (place.path, place.work, place.inside) == (tmp_path, tmp_path / BESIDE, True)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_beside_is_continued_there(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / f"out{BESIDE}").mkdir()
    assert output_folder(tmp_path / "out").work == tmp_path / f"out{BESIDE}"


def test_ways_of_writing_one_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("out", "./out", "out/", "~/out", tmp_path / "out", f"{tmp_path}/x/../out"):
        assert output_folder(given).path == tmp_path / "out", given
    assert output_folder(".").work == tmp_path / BESIDE
    assert output_folder("/").work == Path(f"/{BESIDE}")


@pytest.mark.parametrize("exists", [True, False])
def test_links_are_followed_and_stay(tmp_path, exists):
    if exists:
        (tmp_path / "disk" / "real").mkdir(parents=True)
    else:
        (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/real")
    place = output_folder(tmp_path / "out").tried()
    assert place.path == tmp_path / "disk" / "real"
    assert place.work == tmp_path / "disk" / ("real/" + BESIDE if exists else "real" + BESIDE)


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "pipe"):
        with pytest.raises(UserError, match=f"{name} exists and is no folder. Choose another output folder"):
            output_folder(tmp_path / name)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="cannot write .*loop.*symbolic links"):
        output_folder(tmp_path / "loop")
    with pytest.raises(UserError, match="cannot write .*Not a directory"):
        output_folder(tmp_path / "file" / "out").tried()
    with pytest.raises(UserError, match="cannot write .*File name too long"):
        output_folder(tmp_path / ("x" * 300)).tried()
    for nothing in ("", "a\0b"):
        with pytest.raises(UserError, match="is no path to write to"):
            output_folder(nothing)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "pipe", "loop"}


def test_the_model_itself_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    for model, output in (("model", "model/"), ("model", "link"), ("link", "model")):
        with pytest.raises(UserError, match="is the model itself. Choose another output folder"):
            output_folder(f"{tmp_path}/{output}", tmp_path / model)
    output_folder(tmp_path / "model" / "inside", tmp_path / "model")


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 120, "two\nlines"])
def test_names_that_leave_no_room_for_an_ending_are_filled_from_inside(tmp_path, name):
    place = output_folder(tmp_path / name).tried()
    assert place.inside == (len(os.fsencode(name)) > 230)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_renames_no_folders_is_filled_from_inside(tmp_path, monkeypatch):
    real = os.rename

    def rename(source, target):
        if os.path.isdir(source):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    assert output_folder(tmp_path / "out").tried().inside
    assert list(tmp_path.iterdir()) == []


def test_housekeeping_is_no_content(tmp_path):
    for name in (BESIDE, "lost+found"):
        (tmp_path / name).mkdir()
    place = output_folder(tmp_path)
    assert place.entries() == []
    (tmp_path / "b").write_text("x")
    (tmp_path / "a").write_text("x")
    place.refuse_others({"a", "b"})
    with pytest.raises(UserError, match=r"holds 'a' and 1 more, which quern did not write. Choose another"):
        place.refuse_others(())
    with pytest.raises(UserError, match=r"holds 'b', which quern did not write. Do this"):
        place.refuse_others({"a"}, "Do this")


def test_a_mount_point_is_filled_from_inside(tmp_path):
    with tmpfs(tmp_path / "out") as out:
        place = output_folder(out).tried()
        assert place.inside
        assert list(out.iterdir()) == []


def test_a_read_only_folder_is_refused_and_a_disk_mounted_in_it_is_not(tmp_path):
    volume = tmp_path / "locked" / "volume"
    volume.mkdir(parents=True)
    with read_only(tmp_path / "locked") as locked, tmpfs(volume):
        with pytest.raises(UserError, match=r"cannot write .*new: Read-only file system. Choose another folder"):
            output_folder(locked / "new").tried()
        with pytest.raises(UserError, match="cannot write .*Read-only file system"):
            output_folder(locked).tried()
        assert output_folder(volume).tried().inside
        assert output_folder(volume / "new").tried().work == volume / f"new{BESIDE}"


def test_a_full_disk_is_refused_before_the_work(tmp_path):
    with tmpfs(tmp_path / "small", "64k") as small:
        with open(small / "filler", "wb", buffering=0) as file:
            assert file.write(b"x" * 100_000) < 100_000, "the disk took a part"
        with pytest.raises(UserError, match="not enough room to write .*Free some space"):
            output_folder(small / "out").tried()
        assert [path.name for path in small.iterdir()] == ["filler"]


def test_a_folder_without_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("nothing is forbidden to this user")
    with pytest.raises(UserError, match="Permission denied"):
        output_folder(tmp_path / "locked" / "out").tried()


# Files


def test_a_new_file_and_one_of_querns(tmp_path):
    assert output_file(tmp_path / "a" / "page.html", nothing_is_ours) == tmp_path / "a" / "page.html"
    assert list(tmp_path.iterdir()) == []
    page = tmp_path / "page.html"
    page.touch()
    assert output_file(page, nothing_is_ours) == page
    page.write_text("mine")
    with pytest.raises(UserError, match=r"page.html exists and was not written by quern. Move it away"):
        output_file(page, nothing_is_ours)
    assert output_file(page, everything_is_ours) == page
    assert page.read_text() == "mine"


@pytest.mark.parametrize("given", [".", "..", "folder", "folder/", "new/"])
def test_a_folder_is_no_file(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="is a folder, and a file is to be written. Add the file's name to it"):
        output_file(given, everything_is_ours)


def test_special_files_and_places_below_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is not a regular file"):
        output_file(tmp_path / "pipe", everything_is_ours)
    with pytest.raises(UserError, match="is not a regular file"):
        output_file("/dev/null", everything_is_ours)
    with pytest.raises(UserError, match="cannot write .*Not a directory"):
        output_file(tmp_path / "file" / "page.html", everything_is_ours)


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "page.html").symlink_to("disk/real.html")
    for content in (b"one", b"two"):
        write_output(output_file(tmp_path / "page.html", everything_is_ours), content)
        assert (tmp_path / "disk" / "real.html").read_bytes() == content
    assert (tmp_path / "page.html").is_symlink()


def test_the_longest_name(tmp_path):
    name = "ü" * 125 + ".html"
    write_output(output_file(tmp_path / name, nothing_is_ours), b"x")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_mounted_by_itself_is_written_in_place(tmp_path):
    (tmp_path / "real.html").write_text("long old content")
    page = tmp_path / "folder" / "page.html"
    page.parent.mkdir()
    page.touch()
    with mounted(page, "--bind", str(tmp_path / "real.html")):
        write_output(output_file(page, everything_is_ours), b"new")
    assert (tmp_path / "real.html").read_bytes() == b"new"
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]


def test_a_full_disk_keeps_the_old_file(tmp_path):
    with tmpfs(tmp_path / "small", "64k") as small:
        (small / "page.html").write_bytes(b"old")
        with pytest.raises(UserError, match="not enough room"):
            write_output(output_file(small / "page.html", everything_is_ours), b"x" * 100_000)
        assert (small / "page.html").read_bytes() == b"old"


def test_resolved_paths_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolved("x") == tmp_path / "x"

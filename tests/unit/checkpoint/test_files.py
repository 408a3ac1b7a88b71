"""Writes are whole or absent, and say what to do when they fail."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
from collections import namedtuple

import pytest
import torch

from quern.checkpoint import files
from quern.checkpoint.safetensors_file import write_safetensors
from quern.core.errors import BadFileError, UserError

Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_is_named_before_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 93, 7))
    with pytest.raises(UserError, match=r"file.*: 100 bytes are needed and 7 bytes are free") as caught:
        files.write_bytes(tmp_path / "file", bytes(100))
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tmp_path):
    """A real refusal by the operating system: the largest file that this process may write."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, old[1]))
    try:
        with pytest.raises(UserError, match="no file may be so large there"):
            write_safetensors(tmp_path / "file", {"a": torch.zeros(1 << 16)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "not enough room"),
        (errno.EDQUOT, "not enough room"),
        (errno.EACCES, "change the permissions"),
        (errno.EROFS, "Choose another folder"),
        (errno.EIO, "another place"),
    ],
)
def test_errors_of_the_operating_system_are_explained_and_leave_nothing(tmp_path, monkeypatch, number, words):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=words):
        files.write_bytes(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        files.write_bytes(tmp_path / "file", b"new")


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match="cannot write"):
        files.write_bytes(tmp_path / "file" / "inner", b"new")


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    files.write_bytes(tmp_path / "file", b"old")

    def interrupted() -> None:
        with files.atomic_output(tmp_path / "file", 3) as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_folders_on_the_way_are_made(tmp_path):
    files.write_json(tmp_path / "a" / "b" / "file.json", {"z": 1, "ä": [None]})
    assert (tmp_path / "a" / "b" / "file.json").read_text("utf-8") == '{\n  "z": 1,\n  "ä": [\n    null\n  ]\n}\n'


def test_nan_is_not_written_as_json(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        files.write_json(tmp_path / "file.json", {"a": float("nan")})
    assert not (tmp_path / "file.json").exists()


def test_hash_of_a_file_and_of_a_part(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert files.sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()
    digest, seen = hashlib.sha256(), []
    files.sha256_into(digest, tmp_path / "file", begin=10, end=1_200_000, advance=seen.append)
    assert digest.hexdigest() == hashlib.sha256(data[10:1_200_000]).hexdigest()
    assert sum(seen) == 1_200_000 - 10


def test_a_range_beyond_the_end_is_refused_before_it_is_allocated(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    with files.InputFile(tmp_path / "file") as file:
        assert file.read(1, 2) == b"bc"
        assert file.read(3, 0) == b""
        with pytest.raises(BadFileError, match="truncated"):
            file.read(1, 1 << 60)


def test_json_is_read_strictly(tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"a": [1, {"b": None}]}))
    assert files.read_json(path) == {"a": [1, {"b": None}]}
    for text in ("", "3", '{"a": 1, "a": 2}', '{"a": -Infinity}', '{"a": {"b": 1, "b": 1}}'):
        path.write_text(text)
        with pytest.raises(BadFileError, match=r"file\.json"):
            files.read_json(path)
    path.write_text('{"a": 1}')
    with pytest.raises(BadFileError, match="more than the 4"):
        files.read_json(path, limit=4)

"""Disks that are too small for what measuring puts on them: said before anything is computed, with what helps."""

from __future__ import annotations

import tempfile

import pytest
from mounts import tmpfs

from quern.comparison import measure
from quern.core.errors import UserError
from quern.core.machine import temporary
from quern.core.machine.temporary import is_temporary, temporary_file, temporary_folder
from quern.pipeline import compare as comparing
from quern.pipeline.compare import compare
from quern.pipeline.evaluate import evaluate


@pytest.fixture
def no_work(monkeypatch):
    """Neither a model is loaded nor an artifact made."""

    def started(*_, **__):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(measure, "Worker", started)
    monkeypatch.setattr(comparing, "make_artifact", started)


def test_temporary_folders_are_known_and_go(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder("evaluate") as folder:
        assert folder.parent == tmp_path
        assert is_temporary(folder / "a" / "b")
        assert not is_temporary(tmp_path / "quern-mine" / "a")
    assert list(tmp_path.iterdir()) == []
    with temporary_file() as file:
        file.write(b"x")


@pytest.mark.parametrize("make", [lambda: temporary_folder("evaluate").__enter__(), temporary_file])
def test_no_temporary_files_at_all(tmp_path, monkeypatch, make):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(UserError, match="no temporary files can be written: No such file.*TMPDIR"):
        make()
    with tmpfs(tmp_path / "full", "16k,nr_inodes=1") as full:
        monkeypatch.setattr(tempfile, "tempdir", str(full))
        with pytest.raises(UserError, match=r"No space left on device\. Free some space, or set .* TMPDIR"):
            make()


def test_evaluating_names_the_variable_and_no_option_that_it_has_not(
    tiny_model, tiny_text, tmp_path, monkeypatch, no_work
):
    with tmpfs(tmp_path / "small", "128k") as small:
        monkeypatch.setattr(tempfile, "tempdir", str(small))
        with pytest.raises(UserError) as caught:
            evaluate(tiny_model, texts=[tiny_text], tokens=2000, speed_rounds=0)
        assert list(small.iterdir()) == []
    assert "the reference logits need" in str(caught.value)
    assert caught.value.on_command_line.endswith(
        f"Score fewer tokens (--tokens). Free some space, or {temporary.ELSEWHERE}"
    )
    assert "another disk" not in str(caught.value)


def test_windows_that_do_not_fit(tiny_model, tiny_text, tmp_path, monkeypatch, no_work):
    with tmpfs(tmp_path / "small", "8k") as small:
        monkeypatch.setattr(tempfile, "tempdir", str(small))
        with pytest.raises(UserError, match=r"not enough room to write .*windows.npz.*TMPDIR"):
            evaluate(tiny_model, texts=[tiny_text], tokens=4000, speed_rounds=0)


def test_a_comparison_is_refused_before_anything_is_quantized(tiny_model, tiny_text, tmp_path, monkeypatch, no_work):
    monkeypatch.setattr(comparing, "probe", lambda threads: {"warnings": []})
    with tmpfs(tmp_path / "small", "160k") as small:
        with pytest.raises(UserError, match=r"the reference logits need .*choose a folder on another disk"):
            compare(tiny_model, small, recipes=["rtn4"], texts=[tiny_text], tokens=2000, speed_rounds=0)
        assert not (small / "artifacts").exists()

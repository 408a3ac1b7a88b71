"""The work folder: what is finished stays finished, whatever happens to the process."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from work_folder_job import FINGERPRINT, LAST, NEW, OLD, hashes, run_and_die, run_into, run_job

from quern.checkpoint.files import write_bytes
from quern.checkpoint.jobs.work_folder import WorkFolder, finish_removal
from quern.core.errors import BadFileError, UserError

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def processes():
    """Starts processes in milliseconds: forks of a server that has imported everything and does nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["quern.checkpoint.jobs.work_folder"])
    return context


@pytest.fixture
def expected(tmp_path):
    run_job(tmp_path / "reference.work", tmp_path / "reference")
    assert not (tmp_path / "reference.work").exists()
    return hashes(tmp_path / "reference")


def run(processes, target, *arguments) -> int:
    process = processes.Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def test_a_kill_before_any_change_of_the_disk_loses_nothing(processes, expected, tmp_path):
    """Exhaustive: the job is killed before its 1st, 2nd, ... last such call, and at times again while it resumes."""
    calls = 0
    while True:
        calls += 1
        work, out = tmp_path / f"{calls}.work", tmp_path / str(calls)
        code = run(processes, run_and_die, calls, run_job, work, out)
        if code == 0:
            break
        assert code == KILLED
        # Not before the rename that publishes it may anything be seen.
        assert not out.exists() or hashes(out) == expected
        if calls % 3 == 0:
            run(processes, run_and_die, 1 + calls % 7, run_job, work, out)
        run_job(work, out)
        assert hashes(out) == expected
        assert not work.exists()
        assert not work.with_name(f"{work.name}.removing").exists()
    assert calls > 40


@pytest.mark.parametrize("before", [{}, OLD], ids=["empty", "older artifact"])
def test_kills_while_files_are_moved_into_a_folder_never_leave_a_mixture(processes, tmp_path, before):
    """Exhaustive: what says that a folder is complete (``LAST``) is never there together with files of two artifacts."""
    calls = 0
    while True:
        calls += 1
        out = tmp_path / str(calls)
        write(out, before)
        code = run(processes, run_and_die, calls, run_into, out)
        assert code in (0, KILLED)
        found = {name: (out / name).read_text() for name in {*NEW, *OLD} if (out / name).exists()}
        if any(name in found for name in LAST[1:]):
            whole = OLD if found.get("config.json", found.get("quern.json", "")).startswith("old") else NEW
            assert {name: found[name] for name in found if name in whole} == {
                name: whole[name] for name in whole if name in found
            }
            weights = [name for name in whole if name not in LAST]
            assert all(name in found for name in weights)
        if calls % 3 == 0:
            run(processes, run_and_die, 1 + calls % 5, run_into, out)
        run_into(out)
        assert {path.name: path.read_text() for path in out.iterdir()} == NEW
        if code == 0:
            break
    assert calls > 20


def write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)


def test_a_stranger_in_the_way_of_a_file_is_kept(tmp_path):
    write(tmp_path / "out", {})
    with WorkFolder.open(tmp_path / "out" / ".quern-work", FINGERPRINT) as work:
        for name, content in NEW.items():
            write_bytes(work.path("artifact", name), content.encode())
        (tmp_path / "out" / "mine").write_text("mine")
        with pytest.raises(UserError, match="holds 'mine', which quern did not write"):
            work.publish(work.path("artifact"), tmp_path / "out", last=LAST)
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def stopped_among_its_files(out: Path, monkeypatch, before: dict[str, str], moved: int = 2) -> None:
    """A publication into ``out`` that ended after so many files."""
    write(out, before)
    real, left = os.rename, [moved]

    def rename(source, target):
        if Path(target).parent == out:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            run_into(out)


def test_a_publication_in_whose_way_a_file_appeared_is_refused_until_it_is_gone(tmp_path, monkeypatch):
    out = tmp_path / "out"
    stopped_among_its_files(out, monkeypatch, {})
    (out / "config.json").write_text("mine")
    with pytest.raises(UserError, match=r"config.json has appeared meanwhile.*the work is kept"):
        run_into(out)
    assert (out / "config.json").read_text() == "mine"
    (out / "config.json").unlink()
    run_into(out)
    assert {path.name: path.read_text() for path in out.iterdir()} == NEW


def test_a_publication_that_lost_a_file_says_so_and_fresh_takes_the_rest_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    stopped_among_its_files(out, monkeypatch, OLD)
    (out / "model-1").unlink()
    with pytest.raises(UserError, match=r"model-1 is gone.*fresh=True"):
        run_into(out)
    WorkFolder.open(out / ".quern-work", FINGERPRINT, fresh=True).close()
    assert [path.name for path in out.iterdir()] == [".quern-work"]


def test_fresh_keeps_what_was_published_whole(tmp_path):
    out = tmp_path / "out"
    write(out, {})
    with WorkFolder.open(out / ".quern-work", FINGERPRINT) as work:
        for name, content in NEW.items():
            write_bytes(work.path("artifact", name), content.encode())
        work.remove = work.close  # as if killed in between
        work.publish(work.path("artifact"), out, last=LAST)
    WorkFolder.open(out / ".quern-work", FINGERPRINT, fresh=True).close()
    assert {path.name: path.read_text() for path in out.iterdir() if path.is_file()} == NEW


def test_a_folder_that_came_to_lie_on_another_disk_gets_copies(tmp_path, monkeypatch):
    out = tmp_path / "out"
    real = os.rename

    def rename(source, target):
        if Path(target).parent == out:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(source, target)

    with finished(tmp_path / "work") as work, monkeypatch.context() as patch:
        out.mkdir()
        patch.setattr(os, "rename", rename)
        work.publish(work.path("artifact"), out)
    assert [path.name for path in out.iterdir()] == ["x.safetensors"]
    assert not (tmp_path / "work").exists()


def test_kills_at_random_moments_lose_nothing(processes, expected, tmp_path):
    moments = random.Random(20)
    work, out = tmp_path / "out.work", tmp_path / "out"
    kills = 0
    for attempt in range(20):
        process = processes.Process(target=run_job, args=(work, out, 0.02))
        process.start()
        time.sleep(moments.uniform(0.0, 0.15))
        process.kill()
        process.join()
        kills += process.exitcode == KILLED
        if out.exists():
            assert hashes(out) == expected
            work, out = tmp_path / f"{attempt}.work", tmp_path / str(attempt)
    run_job(work, out)
    assert hashes(out) == expected
    assert kills >= 5


def test_a_step_is_done_when_it_was_finished(tmp_path):
    with WorkFolder.open(tmp_path / "work", FINGERPRINT) as work:
        assert work.done("one") is None
        path = work.write_tensors("deep/er/x", {"x": torch.arange(3)})
        work.finish("one", [path], {"loss": 0.5, "names": ["a"]})
        assert work.done("one") == {"loss": 0.5, "names": ["a"]}
    with WorkFolder.open(tmp_path / "work", FINGERPRINT) as work:
        assert work.done("one") == {"loss": 0.5, "names": ["a"]}
        assert work.done("two") is None
        assert torch.equal(work.read_tensors("deep/er/x")["x"], torch.arange(3))


@pytest.mark.parametrize("damage", ["gone", "longer", "changed"])
def test_a_step_with_damaged_files_is_not_done(tmp_path, damage):
    with WorkFolder.open(tmp_path / "work", FINGERPRINT) as work:
        path = work.write_tensors("x", {"x": torch.arange(3)})
        work.finish("one", [path], {})
        raw = path.read_bytes()
        path.unlink()
        if damage != "gone":
            path.write_bytes(raw + b"!" if damage == "longer" else raw[:-1] + b"!")
        assert work.done("one") is None
        path.unlink(missing_ok=True)
        path.write_bytes(raw)
        assert work.done("one") == {}


def test_the_last_record_of_a_step_counts(tmp_path):
    with WorkFolder.open(tmp_path / "work", FINGERPRINT) as work:
        for value in (1, 2):
            work.finish("one", [work.write_tensors("x", {"x": torch.tensor(value)})], {"value": value})
    with WorkFolder.open(tmp_path / "work", FINGERPRINT) as work:
        assert work.done("one") == {"value": 2}


@pytest.mark.parametrize(
    "torn", [b'{"step": "two", "fi', b"\x00\x00\x00", b'{"step": "two"}\n', b"[]\n", b"null\n", b"\xff\n"]
)
def test_a_torn_line_and_what_follows_are_cut_off(tmp_path, torn):
    with WorkFolder.open(tmp_path / "work", FINGERPRINT) as work:
        work.finish("one", [], {})
    journal = tmp_path / "work" / "journal.jsonl"
    good = journal.read_bytes()
    journal.write_bytes(good + torn)
    with WorkFolder.open(tmp_path / "work", FINGERPRINT) as work:
        assert work.done("one") == {}
        assert work.done("two") is None
        assert journal.read_bytes() == good
        work.finish("two", [], {})
    with WorkFolder.open(tmp_path / "work", FINGERPRINT) as work:
        assert work.done("two") == {}


def test_what_no_record_lists_is_removed_on_opening(tmp_path):
    with WorkFolder.open(tmp_path / "work", FINGERPRINT) as work:
        work.finish("one", [work.write_tensors("a/x", {"x": torch.arange(3)})], {})
        work.write_tensors("a/half", {"x": torch.arange(3)})
        work.path("b").mkdir()
        work.path("b", ".file.tmp").write_text("half")
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "file").write_text("not ours")
        work.path("link").symlink_to(outside)
    with WorkFolder.open(tmp_path / "work", FINGERPRINT):
        assert set(hashes(tmp_path / "work")) == {"a/x.safetensors", "fingerprint.json", "journal.jsonl", "lock"}
    assert (outside / "file").read_text() == "not ours"
    assert not (tmp_path / "work" / "b").exists()


def test_another_fingerprint_is_refused_with_the_differences(tmp_path):
    WorkFolder.open(tmp_path / "work", {**FINGERPRINT, "model": "abc", "texts": [1, 2]}).close()
    now = {"recipe": {"bits": 3, "group": 64}, "seed": 1, "model": "abc", "texts": [1, 3]}
    with pytest.raises(UserError) as caught:
        WorkFolder.open(tmp_path / "work", now)
    message = str(caught.value)
    assert "recipe.bits: 4 -> 3\n" in message
    assert "recipe.group: (absent) -> 64\n" in message
    assert "texts: [1, 2] -> [1, 3]\n" in message
    assert "pass fresh=True" in message
    assert "seed" not in message
    assert "abc" not in message


def test_a_damaged_fingerprint_is_no_file_to_copy_again(tmp_path):
    WorkFolder.open(tmp_path / "work", {"a": 1}).close()
    (tmp_path / "work" / "fingerprint.json").write_bytes(b'{"a": \xff}')
    with pytest.raises(BadFileError, match=r"fingerprint.json: .*not UTF-8.*Start over with fresh=True$"):
        WorkFolder.open(tmp_path / "work", {"a": 1})
    with WorkFolder.open(tmp_path / "work", {"a": 2}, fresh=True) as work:
        assert work.done("x") is None


def test_fresh_forgets_everything(tmp_path):
    with WorkFolder.open(tmp_path / "work", FINGERPRINT) as work:
        work.finish("one", [work.write_tensors("x", {"x": torch.arange(3)})], {})
    other = {"seed": 2}
    with WorkFolder.open(tmp_path / "work", other, fresh=True) as work:
        assert work.done("one") is None
        assert not work.path("x.safetensors").exists()
    WorkFolder.open(tmp_path / "work", other).close()


def test_tuples_and_numbers_compare_as_the_json_they_become(tmp_path):
    WorkFolder.open(tmp_path / "work", {"a": (1, 2), "b": 0.1}).close()
    WorkFolder.open(tmp_path / "work", {"a": [1, 2], "b": 0.1}).close()


def test_two_processes_cannot_work_in_one_folder(processes, tmp_path):
    with WorkFolder.open(tmp_path / "work", FINGERPRINT):
        with pytest.raises(UserError, match=rf"another process \(id {os.getpid()}\) is working in"):
            WorkFolder.open(tmp_path / "work", FINGERPRINT)
        assert run(processes, _expect_refusal, tmp_path / "work") == 0
    WorkFolder.open(tmp_path / "work", FINGERPRINT).close()


def _expect_refusal(folder: Path) -> None:
    with pytest.raises(UserError, match="another process"):
        WorkFolder.open(folder, FINGERPRINT, fresh=True)


def test_a_folder_that_is_not_ours_is_not_touched(tmp_path):
    (tmp_path / "precious").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(UserError, match="not a quern work folder"):
            WorkFolder.open(tmp_path, FINGERPRINT, fresh=fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    with pytest.raises(UserError, match="a file of that name exists"):
        WorkFolder.open(tmp_path / "precious", FINGERPRINT)


def test_a_full_disk_leaves_a_journal_that_still_reads(tmp_path, monkeypatch):
    with WorkFolder.open(tmp_path / "work", FINGERPRINT) as work:
        work.finish("one", [], {})
        good = work.path("journal.jsonl").read_bytes()

        def full(_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(UserError, match="not enough room"):
                work.finish("two", [], {})
        assert work.path("journal.jsonl").read_bytes() == good
        assert work.done("two") is None
        work.finish("two", [], {})
        assert work.done("two") == {}


def test_data_must_be_json(tmp_path):
    with WorkFolder.open(tmp_path / "work", FINGERPRINT) as work:
        for bad in ({"loss": float("nan")}, {"x": torch.zeros(1)}):
            with pytest.raises((ValueError, TypeError)):
                work.finish("one", [], bad)
        assert work.done("one") is None


def test_files_outside_the_folder_cannot_be_recorded(tmp_path):
    (tmp_path / "outside").write_text("x")
    with WorkFolder.open(tmp_path / "work", FINGERPRINT) as work, pytest.raises(ValueError, match="not in the subpath"):
        work.finish("one", [tmp_path / "outside"], {})


def finished(folder: Path) -> WorkFolder:
    work = WorkFolder.open(folder, FINGERPRINT)
    work.write_tensors("artifact/x", {"x": torch.arange(3)})
    return work


def test_publishing_needs_a_free_place(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    with finished(tmp_path / "work") as work:
        with pytest.raises(UserError, match="holds 'mine', which quern did not write.*the work is kept"):
            work.publish(work.path("artifact"), out)
        assert work.path("artifact", "x.safetensors").exists()
        (out / "mine").unlink()
        work.publish(work.path("artifact"), out)
    assert [path.name for path in out.iterdir()] == ["x.safetensors"]
    assert not (tmp_path / "work").exists()


def test_removal_is_finished_only_for_what_was_published_there(tmp_path):
    finished(tmp_path / "work").close()
    finish_removal(tmp_path / "work", tmp_path / "out")
    assert (tmp_path / "work").exists()
    with finished(tmp_path / "work") as work:
        work.remove = work.close  # as if killed in between
        work.publish(work.path("artifact"), tmp_path / "out")
    finish_removal(tmp_path / "work", tmp_path / "elsewhere")
    assert (tmp_path / "work").exists()
    finish_removal(tmp_path / "work", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    finish_removal(tmp_path / "work", tmp_path / "out")


def test_a_strangers_folder_of_the_name_used_for_removal_is_kept(tmp_path):
    stranger = tmp_path / "work.removing"
    stranger.mkdir()
    (stranger / "precious").write_text("mine")
    with finished(tmp_path / "work") as work, pytest.raises(UserError, match="cannot write"):
        work.remove()
    assert (stranger / "precious").read_text() == "mine"


def test_publishing_to_another_disk_is_refused(tmp_path, monkeypatch):
    def another_disk(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    with finished(tmp_path / "work") as work, monkeypatch.context() as patch:
        patch.setattr(os, "rename", another_disk)
        with pytest.raises(UserError, match=r"cannot write .*out"):
            work.publish(work.path("artifact"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "work" / "artifact" / "x.safetensors").exists()


def test_the_journal_is_lines_of_json(tmp_path):
    with WorkFolder.open(tmp_path / "work", FINGERPRINT) as work:
        work.finish("öne", [work.write_tensors("x", {"x": torch.arange(3)})], {"a": 1})
        (line,) = work.path("journal.jsonl").read_text("ascii").splitlines()
        record = json.loads(line)
        assert record["step"] == "öne"
        assert record["data"] == {"a": 1}
        assert list(record["files"]) == ["x.safetensors"]


def test_a_job_inside_this_one_keeps_its_files_unless_all_starts_over(tmp_path):
    folder = tmp_path / "work"
    names = ("start/model", "start.quern-work/journal.jsonl", "start.quern-work/weights/0", "other/file")
    with WorkFolder.open(folder, {"job": 1}, nested="start") as work:
        for name in names:
            path = work.path(*name.split("/"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
    with WorkFolder.open(folder, {"job": 1}, nested="start") as work:
        assert [work.path(*name.split("/")).exists() for name in names] == [True, True, True, False]
    with WorkFolder.open(folder, {"job": 2}, fresh=True, nested="start") as work:
        assert not any(work.path(*name.split("/")).exists() for name in names)

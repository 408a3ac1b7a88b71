"""Disks that are too small: said with numbers before the work, and before a block; what is finished is kept."""

import errno
import os

import pytest
from artifacts import hashes, small_recipe
from mounts import tmpfs
from typer.testing import CliRunner

import quern
from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.cli.main import app
from quern.core.errors import NotEnoughDiskError
from quern.core.progress import Silent
from quern.pipeline.blockwise import disk_plan

GPTQ = {"rounding": {"method": "gptq"}, "calibration": {"tokens": 1024, "sequence_length": 64}}
RECIPES = {
    "nearest": {},
    "plain Hessians": {**GPTQ, "calibration": {**GPTQ["calibration"], "token_weight": "none"}},
    "Fisher weights": GPTQ,
    "two streams": {**GPTQ, "rounding": {"method": "gptq", "target": "drift"}},
    "both sides": {**GPTQ, "rounding": {"method": "gptq", "two_sided": True}},
    "both sides, again": {
        **GPTQ, "rounding": {"method": "gptq", "two_sided": True}, "transforms": [{"method": "awq"}],
    },
    "one file": {"weights": {"codec": "ggml", "type": "q4_0"}, "format": "gguf"},
}  # fmt: skip


class Watched(Silent):
    """Does something behind each of some steps of a task, and keeps what is logged."""

    def __init__(self, task="", acts=()):
        self.wanted, self.acts, self.said = task, list(acts), []

    def task(self, description, total, done=0, work=None):
        return _Step(self.acts if description == self.wanted else [])

    def log(self, message):
        self.said.append(message)


class _Step:
    def __init__(self, acts):
        self.acts = acts

    def advance(self, steps=1):
        if self.acts:
            self.acts.pop(0)()

    def done(self):
        pass


@pytest.mark.parametrize("case", RECIPES)
def test_what_is_foretold_is_what_the_work_folder_takes(case, tiny_model, tiny_text, tmp_path, monkeypatch):
    plans, peak = [], [0]
    plan = disk_plan.plan

    def planned(job):
        plans.append(plan(job))
        return plans[-1]

    def watched(recorded):
        def finished(work, *given):
            recorded(work, *given)
            peak[0] = max(peak[0], disk_plan.folder_bytes(work.folder))

        return finished

    monkeypatch.setattr(disk_plan, "plan", planned)
    for name in ("finish", "grow"):
        monkeypatch.setattr(WorkFolder, name, watched(getattr(WorkFolder, name)))
    output = tmp_path / ("out.gguf" if case == "one file" else "out")
    quern.quantize(tiny_model, output, recipe=small_recipe(name="test", **RECIPES[case]), calibration=[tiny_text])
    (found,) = plans
    assert peak[0] <= found.peak
    assert found.peak <= 1.3 * peak[0] + (1 << 16), (found, peak)


def test_it_is_refused_before_the_work_with_what_is_needed_and_free(tiny_model, tmp_path):
    with tmpfs(tmp_path / "small", "128k") as small:
        with pytest.raises(NotEnoughDiskError) as caught:
            quern.quantize(tiny_model, small / "out", recipe=small_recipe())
        said = str(caught.value)
        assert said.startswith(f"not enough room on the disk: the work in {small / 'out.quern-work'} needs ")
        assert "kB are free there. Free " in said
        assert caught.value.missing_bytes > 0
        assert os.listdir(small) == []
        shown = CliRunner().invoke(app, ["quantize", str(tiny_model), "-o", str(small / "out"), "--recipe", "rtn4"])
        assert shown.exit_code == 2
        assert "not enough room on the disk" in shown.stderr
        assert os.listdir(small) == []


def test_a_disk_that_others_fill_stops_before_a_block_and_goes_on_later(tiny_model, tmp_path):
    quern.quantize(tiny_model, tmp_path / "whole", recipe=small_recipe())
    with tmpfs(tmp_path / "disk", "4m") as disk:

        def fill():
            usage = os.statvfs(disk)
            (disk / "others").write_bytes(bytes(usage.f_bavail * usage.f_frsize - 8192))

        with pytest.raises(NotEnoughDiskError, match=r"stopped before block 1 of 3: it needs .* are free in .*is kept"):
            quern.quantize(
                tiny_model, disk / "out", recipe=small_recipe(), progress=Watched("quantizing blocks", [fill])
            )
        assert sorted(os.listdir(disk)) == ["others", "out.quern-work"]
        assert quern.status(disk / "out").jobs[0].blocks == 1
        with pytest.raises(NotEnoughDiskError, match="at its peak .* are there already"):
            quern.quantize(tiny_model, disk / "out", recipe=small_recipe())
        assert quern.status(disk / "out").jobs[0].blocks == 1, "a job that was begun is kept"
        (disk / "others").unlink()
        assert quern.quantize(tiny_model, disk / "out", recipe=small_recipe()).resumed
        assert hashes(disk / "out") == hashes(tmp_path / "whole")


def test_a_write_that_fails_in_a_block_leaves_what_is_finished(tiny_model, tmp_path, monkeypatch):
    """As where a quota is used up, of which the free bytes of the disk tell nothing."""
    sync = os.fsync

    def full(descriptor):
        if "model-00003" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    shown = CliRunner().invoke(app, ["quantize", str(tiny_model), "-o", str(tmp_path / "out"), "--recipe", "rtn4"])
    assert shown.exit_code == 2
    assert "not enough room to write" in shown.stderr
    assert "what is finished is kept" in shown.stderr
    assert "Traceback" not in shown.stderr
    monkeypatch.undo()
    assert quern.status(tmp_path / "out").jobs[0].blocks == 1
    assert quern.quantize(tiny_model, tmp_path / "out", recipe="rtn4").resumed


def test_blocks_that_will_not_fit_are_told_once(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(disk_plan, "check", lambda job: None)
    with tmpfs(tmp_path / "disk", "4m") as disk:
        listener = Watched()
        monkeypatch.setattr(disk_plan, "stage_bytes", lambda job, stage: 1000)
        monkeypatch.setattr(disk_plan, "free_bytes", lambda folder: 2500)
        quern.quantize(tiny_model, disk / "out", recipe=small_recipe(), progress=listener)
    (said,) = [line for line in listener.said if "blocks that are left" in line]
    assert "need 3 kB on the disk, and 2.5 kB are free" in said


def test_a_full_disk_elsewhere_is_no_failure_of_the_program(monkeypatch, tiny_model, tmp_path):
    from quern.pipeline import quantize

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere")

    monkeypatch.setattr(quantize, "chosen_recipe", full)
    shown = CliRunner().invoke(app, ["quantize", str(tiny_model), "-o", str(tmp_path / "out"), "--recipe", "rtn4"])
    assert shown.exit_code == 2
    assert "error: the disk is full (/somewhere): No space left on device. Free some space. The same" in shown.stderr

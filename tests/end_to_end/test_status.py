"""How far jobs are, seen from outside: while one runs, after it was interrupted, and when it is finished."""

import json
import os

import pytest
from artifacts import small_recipe
from tiny_model import calibration_text, tiny_config, write_model
from typer.testing import CliRunner

import quern
from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.cli.main import app
from quern.core.errors import UserError
from quern.core.progress import Silent


class Watcher(Silent):
    """Looks at the job after some steps of a task, and interrupts it there if asked."""

    def __init__(self, output, at, interrupts):
        self.output, self.at, self.interrupts = output, at, interrupts
        self.seen = []
        self.work = {}

    def task(self, description, total, done=0, work=None):
        self.work[description] = total, work
        return Step(self, description, done)


class Step:
    def __init__(self, watcher, description, done):
        self.watcher, self.description, self.count = watcher, description, done

    def advance(self, steps=1):
        self.count += steps
        if (self.description, self.count) == self.watcher.at:
            self.watcher.seen.append(quern.status(self.watcher.output))
            if self.watcher.interrupts:
                raise KeyboardInterrupt

    def done(self):
        pass


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("status")
    write_model(folder / "model", tiny_config())
    (folder / "text.txt").write_text(calibration_text()[:20_000], "utf-8")
    return folder


@pytest.fixture(scope="module")
def jobs(place):
    """What was seen of one job while it ran, after it was interrupted, and when it was finished."""
    output, found = place / "quantized", []
    for interrupts in (True, False):
        watcher = Watcher(output, ("quantizing blocks", 2), interrupts)
        try:
            quern.quantize(place / "model", output, recipe="rtn4", progress=watcher)
        except KeyboardInterrupt:
            found += [watcher.seen[0], quern.status(output)]
    return [*found, quern.status(output)]


def test_a_running_job_names_its_process_and_its_tasks(jobs, place):
    (job,) = jobs[0].jobs
    assert (job.process, job.recipe, job.output) == (os.getpid(), "rtn4", place / "quantized")
    assert job.blocks == 2
    assert [(task.description, task.total) for task in job.tasks] == [("quantizing blocks", 3)]
    assert not jobs[0].finished


def test_a_stopped_job_says_that_nobody_works_on_it(jobs):
    (job,) = jobs[1].jobs
    assert (job.process, job.blocks, job.last_step) == (None, 2, "block 1")
    assert job.bytes > 1000
    assert job.seconds_ago < 600


def test_work_is_told_of_every_step(place, tmp_path):
    watcher = Watcher(tmp_path / "out", None, False)
    recipe = small_recipe(rounding={"method": "gptq"}, overrides=[{"pattern": "*.1.mlp.*", "codec": "none"}])
    quern.quantize(place / "model", tmp_path / "out", recipe=recipe, calibration=[place / "text.txt"], progress=watcher)
    total, (first, second, third) = watcher.work["quantizing blocks"]
    assert total == 3
    assert first == third
    assert second.kind != first.kind
    assert 0 < second.size < first.size, "what is not rounded takes less"
    total, work = watcher.work["token weights"]
    assert total == len(work) == 7
    assert [one.kind if one.kind == "head" else one.kind[0] for one in work] == [
        *["forward"] * 3, "head", *["backward"] * 3,
    ]  # fmt: skip
    assert work[6].size > work[0].size > 0


def test_a_finished_one_leaves_no_job(jobs):
    assert (jobs[2].finished, jobs[2].jobs) == (True, [])


def test_jobs_below_a_folder_are_found(place, tmp_path):
    for name in ("b", "a"):
        with WorkFolder.open(tmp_path / "comparison" / f"{name}.quern-work", {"recipe": {"name": name}}):
            pass
    found = quern.status(tmp_path / "comparison").jobs
    assert [(job.output.name, job.recipe, job.process) for job in found] == [("a", "a", None), ("b", "b", None)]
    with WorkFolder.open(tmp_path / "out" / ".quern-work", {}):
        (job,) = quern.status(tmp_path / "out").jobs
        assert (job.output, job.process) == (tmp_path / "out", os.getpid())
        assert quern.status(tmp_path / "out" / ".quern-work").jobs == [job]


def test_the_time_left_is_that_of_this_runs_pace(tmp_path):
    with WorkFolder.open(tmp_path / "out.quern-work", {}) as work:
        task = work.telling(Silent()).task("quantizing blocks", 80, 60)
        assert quern.status(tmp_path / "out").jobs[0].tasks[0].seconds_left is None
        path = work.path("progress.json")
        content = json.loads(path.read_text("utf-8"))
        content["tasks"][0] |= {"done": 65, "seconds": 100.0, "left": 300.0}
        path.write_text(json.dumps(content), "utf-8")
        assert 240 < quern.status(tmp_path / "out").jobs[0].tasks[0].seconds_left <= 300
        content["since_boot"] -= 200  # so long ago; the clock on the wall was set meanwhile
        content["updated"] += 86400
        path.write_text(json.dumps(content), "utf-8")
        (job,) = quern.status(tmp_path / "out").jobs
        assert 40 < job.tasks[0].seconds_left <= 100
        assert 200 <= job.seconds_ago < 260
        content["since_boot"] -= 200
        path.write_text(json.dumps(content), "utf-8")
        assert quern.status(tmp_path / "out").jobs[0].tasks[0].seconds_left == 0
        task.done()
        assert quern.status(tmp_path / "out").jobs[0].tasks == []


def test_looking_changes_nothing_and_a_torn_line_stays(tmp_path):
    with WorkFolder.open(tmp_path / "out.quern-work", {}) as work:
        work.finish("block 0", [], {})
    journal = tmp_path / "out.quern-work" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"step": "blo')
    before = {path: path.read_bytes() for path in journal.parent.iterdir()}
    assert quern.status(tmp_path / "out").jobs[0].blocks == 1
    assert {path: path.read_bytes() for path in journal.parent.iterdir()} == before


def test_what_a_person_sees(place, tmp_path):
    with WorkFolder.open(tmp_path / "out.quern-work", {"recipe": {"name": "balanced"}}) as work:
        work.finish("block 0", [], {})
        work.telling(Silent()).task("quantizing blocks", 80, 1)
        shown = CliRunner().invoke(app, ["status", str(tmp_path / "out")])
        read = CliRunner().invoke(app, ["status", str(tmp_path / "out"), "--json"])
    assert shown.exit_code == 0, shown.output
    for words in ("balanced", f"by process {os.getpid()}", "1 block; last step: block 0", "1 of 80"):
        assert words in shown.output
    assert json.loads(read.stdout)["jobs"][0]["tasks"][0]["total"] == 80


@pytest.mark.parametrize(("boot", "wall", "ago"), [("another", -50, 50), ("another", 3600, None), (None, -50, 50)])
def test_a_clock_that_jumped_makes_no_absurd_times(tmp_path, boot, wall, ago):
    """After a reboot only the clock on the wall is left, and where that says the future nobody knows."""
    with WorkFolder.open(tmp_path / "out.quern-work", {}) as work:
        work.telling(Silent()).task("quantizing blocks", 80, 60)
        path = work.path("progress.json")
        content = json.loads(path.read_text("utf-8"))
        content |= {"boot": boot, "updated": content["updated"] + wall}
        content["tasks"][0] |= {"left": 300.0}
        path.write_text(json.dumps(content), "utf-8")
        (job,) = quern.status(tmp_path / "out").jobs
        shown = CliRunner().invoke(app, ["status", str(tmp_path / "out")])
    if ago is None:
        assert job.seconds_ago is None
        assert "as of" not in shown.output
    else:
        assert ago <= job.seconds_ago < ago + 60
    assert 0 <= job.tasks[0].seconds_left <= 300


WRONG = [
    b"", b"[]", b"{}", b"null", b'{"updated": 1, "tasks": [{"unknown": 1}]}', b"\xff",
    b'{"updated": "x", "tasks": []}', b'{"updated": 1, "tasks": 5}', b'{"updated": 1, "tasks": [5]}',
    *(b'{"updated": 1, "tasks": [{"description": "a", "total": 4, "done": %s, "before": 0, "seconds": 1}]}' % value
      for value in (b"-1", b"NaN", b"1e300", b'"x"', b"null", b"[]")),
    b'{"updated": 1, "tasks": [{"description": 5, "total": 4, "done": 1, "before": 0, "seconds": 1}]}',
]  # fmt: skip


@pytest.mark.parametrize("content", WRONG)
def test_a_damaged_file_is_named(tmp_path, content):
    with WorkFolder.open(tmp_path / "out.quern-work", {}) as work:
        work.path("progress.json").write_bytes(content)
    with pytest.raises(UserError, match=r"progress\.json"):
        quern.status(tmp_path / "out")


def test_where_nothing_is(tmp_path):
    with pytest.raises(UserError, match=r"there is no nowhere\.quern-work"):
        quern.status(tmp_path / "nowhere")

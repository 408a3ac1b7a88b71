"""The process that measures a contender: what it answers, and what happens when it does not."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import fake_model
import psutil
import pytest
import torch
from fake_model import VOCABULARY, FakeModel, FakeTokenizer, bigram_table, write_model

from quern.comparison.worker_process import COMMAND, Launch, Worker, WorkerError
from quern.core.errors import UserError
from quern.core.metrics import NonFiniteError
from quern.evaluation.accuracy import read_scores, score_windows
from quern.evaluation.reference_cache import ReferenceKey, ReferenceLogits
from quern.evaluation.speed import SpeedRound
from quern.evaluation.texts import cut_windows, save_windows
from quern.texts.source import Text

FAKE = (sys.executable, fake_model.__file__)


def start(command=FAKE, **options):
    return Worker("contender", Launch(command=command, **options))


def script(code):
    return (sys.executable, "-u", "-c", code)


def load(path):
    return {"do": "load", "engine": "fake", "path": str(path), "dtype": "float32", "threads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("worker") / "model", bigram_table())


def gone(process_id):
    try:
        return psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(process_id):
    deadline = time.monotonic() + 20
    while not gone(process_id):
        assert time.monotonic() < deadline, "the process is still there"
        time.sleep(0.02)


def test_a_whole_conversation(folder, tmp_path):
    tokenizer = FakeTokenizer(adds_bos=False)
    windows = cut_windows(
        [Text.of("t", ["the quick brown fox", "jumps over"])],
        tokenizer,
        vocabulary_size=VOCABULARY,
        tokens=24,
        window=8,
    )
    save_windows(tmp_path / "w.npz", windows)
    key = ReferenceKey(
        model_sha256="m", texts_sha256=(), windows_sha256="w", tokens=24, window=8, dtype="float32", engine="fake"
    )
    cache = {"cache": str(tmp_path), "key": key.to_json()}
    text = {"windows_file": str(tmp_path / "w.npz"), "threads": 1, **cache}
    with start() as worker:
        assert worker.ask(load(folder)) == {
            "ok": True,
            "vocabulary_size": VOCABULARY,
            "maximum_length": 64,
            "bytes_per_token": 2 * VOCABULARY**2,
        }
        advanced = []
        assert worker.ask({"do": "reference", "windows": str(tmp_path / "w.npz"), **cache}, advanced.append) == {
            "ok": True
        }
        assert sum(advanced) == 24
        documents = worker.ask({"do": "measure", "name": "kl", **text})["raw"]
        timed = worker.ask({"do": "measure", "name": "decode", "prompt": [3, 4, 5], "decode_tokens": 4})["raw"]
        peak = worker.ask({"do": "measure", "name": "memory"})["raw"]
        process = psutil.Process(worker.process_id)
        assert 0.5 < peak / process.memory_info().rss < 2
    # The file holds bfloat16 weights, so does this model.
    model = FakeModel(bigram_table().to(torch.bfloat16))
    expected = score_windows(model, windows.windows, ReferenceLogits(tmp_path, key))
    assert read_scores(documents) == expected
    assert SpeedRound(**timed).decode_tokens == 4
    assert gone(worker.process_id)


def test_the_module_runs_as_a_command(tmp_path):
    with start(COMMAND) as worker, pytest.raises(UserError, match=r"contender: .*does not exist"):
        worker.ask({**load(tmp_path / "none"), "engine": "reference"})


def test_a_user_error_leaves_the_worker_usable(folder, tmp_path):
    with start() as worker:
        with pytest.raises(UserError, match=r"contender: .*unknown engine 'none'; known: .*fake.*reference"):
            worker.ask({**load(folder), "engine": "none"})
        with pytest.raises(UserError, match="holds no"):
            worker.ask(load(tmp_path))
        assert worker.ask(load(folder))["ok"]


def test_logits_that_are_not_finite(tmp_path):
    path = write_model(tmp_path / "nan", bigram_table(), behaviour="nan")
    with start() as worker:
        worker.ask(load(path))
        tokenizer = FakeTokenizer(adds_bos=False)
        windows = cut_windows([Text.of("t", ["dadada"])], tokenizer, vocabulary_size=VOCABULARY, tokens=6, window=6)
        save_windows(tmp_path / "w.npz", windows)
        request = {"do": "measure", "name": "perplexity", "windows_file": str(tmp_path / "w.npz"), "threads": 1}
        with pytest.raises(NonFiniteError, match="contender: logits holds"):
            worker.ask(request)
        assert worker.ask({"do": "measure", "name": "memory"})["ok"]


def test_a_measure_that_is_unknown_is_refused(folder):
    with start() as worker:
        worker.ask(load(folder))
        with pytest.raises(UserError, match=r"unknown measure 'decod'; known: .*; did you mean 'decode'"):
            worker.ask({"do": "measure", "name": "decod"})


def test_a_bug_comes_with_its_traceback(tmp_path):
    path = write_model(tmp_path / "bug", bigram_table(), behaviour="bug")
    with start() as worker, pytest.raises(WorkerError, match="ZeroDivisionError: a bug in the engine") as caught:
        worker.ask(load(path))
    assert "Traceback" in str(caught.value)
    assert "fake_model.py" in str(caught.value)


def test_a_worker_that_is_killed(tmp_path):
    path = write_model(tmp_path / "die", bigram_table(), behaviour="die")
    with start() as worker, pytest.raises(WorkerError, match=r"ended unexpectedly \(SIGKILL; .*memory\)") as caught:
        worker.ask(load(path))
    assert "about to die" in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_worker_that_hangs(tmp_path):
    path = write_model(tmp_path / "hang", bigram_table(), behaviour="hang")
    with start(silence_s=1.0) as worker:
        with pytest.raises(WorkerError, match="has said nothing for 1 s"):
            worker.ask(load(path))
        assert gone(worker.process_id)


def test_a_worker_that_talks_garbage(tmp_path):
    path = write_model(tmp_path / "garbage", bigram_table(), behaviour="garbage")
    with start() as worker, pytest.raises(WorkerError, match=r"answered 'what is this\\n', which is no answer"):
        worker.ask(load(path))


@pytest.mark.parametrize("line", ["[]", "null", "1", "{}", '{"advance": "much"}', '{"advance": null}', '"ok"'])
def test_json_that_is_no_answer(line):
    with (
        start(script(f"input(); print({line!r}); input()")) as worker,
        pytest.raises(WorkerError, match="is no answer"),
    ):
        worker.ask({"do": "measure"})


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("input()", "exit code 0"),
        ("input(); raise SystemExit(3)", "exit code 3"),
        ("import sys; input(); print('reason', file=sys.stderr); raise SystemExit(3)", "reason"),
        ("raise SystemExit('no such module')", "no such module"),
    ],
)
def test_a_worker_that_ends(code, said):
    with start(script(code)) as worker, pytest.raises(WorkerError, match="ended unexpectedly") as caught:
        worker.ask({"do": "measure"})
    assert said in str(caught.value)


def test_silence_counts_from_the_last_sign_of_life():
    code = (
        "import time; input()\n"
        "for _ in range(6):\n    print('{\"advance\": 1}'); time.sleep(.3)\n"
        "print('{\"ok\": true}'); input()"
    )
    advanced = []
    with start(script(code), silence_s=1.5) as worker:
        assert worker.ask({"do": "measure"}, advanced.append) == {"ok": True}
    assert advanced == [1] * 6


def test_all_answers_together_may_take_so_long():
    code = "import time\nwhile True:\n    input(); time.sleep(.4); print('{\"ok\": true}')"
    with start(script(code), limit_s=1.0) as worker:
        worker.ask({"do": "measure"})
        time.sleep(1.2)  # owes nothing meanwhile
        worker.ask({"do": "measure"})
        with pytest.raises(WorkerError, match="took longer than the 1 s that it may take"):
            worker.ask({"do": "measure"})


def test_a_worker_that_never_comes_to_an_end():
    code = "import time; input()\nwhile True:\n    print('{\"advance\": 1}'); time.sleep(.02)"
    with start(script(code), limit_s=1.0) as worker:
        with pytest.raises(WorkerError, match="took longer than the 1 s that it may take"):
            worker.ask({"do": "measure"})
        assert gone(worker.process_id)


def test_memory_is_looked_at_also_while_it_talks():
    code = (
        "import time; input(); hoard = b'x' * (200 << 20); end = time.monotonic() + 5\n"
        "while time.monotonic() < end:\n    print('{\"advance\": 1}'); time.sleep(.02)\n"
        "print('{\"ok\": true}'); input()"
    )
    with (
        start(script(code), memory=100 << 20) as worker,
        pytest.raises(WorkerError, match=r"used \d+ MB of memory; its cap is 105 MB"),
    ):
        worker.ask({"do": "measure"})


def test_a_worker_that_cannot_be_started(tmp_path):
    with pytest.raises(WorkerError, match=r"contender: its process cannot be started: .*No such file"):
        start((str(tmp_path / "python"),))


def test_children_end_with_it(tmp_path):
    """Also a child that has a session of its own, and also when the block is left by an exception."""
    code = (
        "import subprocess, sys, json\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session={own})\n"
        "input(); print(json.dumps({{'ok': True, 'child': child.pid}}))\n"
        "import time; time.sleep(600)"
    )
    for own in (False, True):
        children = []

        def interrupted(own=own, children=children):
            with start(script(code.format(own=own))) as worker:
                children.extend([worker.ask({"do": "x"})["child"], worker.process_id])
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        for process_id in children:
            wait_until_gone(process_id)


def test_waiting_threads_sleep_unless_the_user_says_otherwise(monkeypatch):
    code = "import os, json; input(); print(json.dumps({'ok': True, 'policy': os.environ['OMP_WAIT_POLICY']})); input()"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    with start(script(code)) as worker:
        assert worker.ask({"do": "x"})["policy"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with start(script(code)) as worker:
        assert worker.ask({"do": "x"})["policy"] == "ACTIVE"


def test_killing_frees_whoever_waits(folder):
    with start(script("input(); import time; time.sleep(600)")) as worker:
        worker.send({"do": "x"})
        worker.kill()
        with pytest.raises(WorkerError, match="ended"):
            worker.receive()


def test_the_worker_ends_when_its_parent_is_gone(tmp_path):
    """Also in the middle of a request: here while it loads."""
    path = write_model(tmp_path / "hang", bigram_table(), behaviour="hang")
    parent = (
        "import json, subprocess, sys, time\n"
        f"worker = subprocess.Popen({list(FAKE)!r}, stdin=subprocess.PIPE, text=True, start_new_session=True)\n"
        f"worker.stdin.write({json.dumps(load(path))!r} + '\\n'); worker.stdin.flush()\n"
        "print(worker.pid, flush=True); time.sleep(600)"
    )
    paths = [str(Path(fake_model.__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    ) as process:
        worker = int(process.stdout.readline())
        time.sleep(0.2)
        assert not gone(worker)
        process.kill()
    wait_until_gone(worker)

"""What tests fork behaves as what Python would have started: by comparison with real processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

TOLD = """
import json, os, subprocess, sys
child = subprocess.run([sys.executable, "-c", "raise SystemExit(7)"]).returncode
told = [sys.argv[1:], __name__, os.getcwd(), os.environ.get("GIVEN"), "LEFT" in os.environ, os.getpgrp() == os.getpid()]
print(json.dumps([*told, os.getsid(0) == os.getpid(), child, sys.stdin.read(), sys.path[0]]))
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "there.py").write_text(TOLD)
    return tmp_path


@pytest.fixture
def environment(monkeypatch):
    """Not the one that the server has had from its start."""
    monkeypatch.setenv("LEFT", "out")
    return {**{name: value for name, value in os.environ.items() if name != "LEFT"}, "GIVEN": "\u00fc"}


def both(forking, folder, environment, *words):
    """Exit code, output and the last line of errors: of a process, and of a fork."""
    for start in (subprocess.Popen, forking.Popen):
        with open(folder / "errors", "w+b") as errors:
            process = start(
                [sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                encoding="utf-8", errors="replace", start_new_session=True, cwd=folder, env=environment,
            )  # fmt: skip
            process.stdin.write("sent")
            process.stdin.close()
            with process.stdout as output:
                said = output.read()
            code = process.wait(60)
            errors.seek(0)
            yield code, said, errors.read().decode().splitlines()[-1:]


@pytest.mark.parametrize("words", [("-c", TOLD), ("-m", "there"), ("there.py",)], ids=lambda words: words[0])
def test_arguments_streams_folder_environment_and_session(forking, folder, environment, words):
    words = [str(folder / word) if word == "there.py" else word for word in words]
    process, fork = both(forking, folder, environment, *words, "one", "-m")
    assert process == fork
    code, said, _ = fork
    assert code == 0
    assert json.loads(said)[:8] == [["one", "-m"], "__main__", str(folder), "\u00fc", False, True, True, 7]
    assert json.loads(said)[8] == "sent"


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("raise SystemExit(3)", 3),
        ("raise SystemExit('words')", 1),
        ("print('said'); 1 / 0", 1),
        ("import os; os._exit(5)", 5),
        ("import os; os.kill(os.getpid(), 11)", -signal.SIGSEGV),
    ],
)
def test_ends(forking, folder, environment, program, code):
    process, fork = both(forking, folder, environment, "-c", program)
    assert process == fork
    assert fork[0] == code


def test_one_that_goes_on_is_waited_for_and_killed(forking, folder):
    with open(folder / "errors", "w+b") as errors:
        fork = forking.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"],
            start_new_session=True, cwd=folder, env=os.environ, stderr=errors,
        )  # fmt: skip
    with fork.stdin, fork.stdout:
        with pytest.raises(subprocess.TimeoutExpired):
            fork.wait(0.05)
        os.killpg(fork.pid, signal.SIGKILL)
        assert fork.wait(60) == -signal.SIGKILL


def test_one_that_takes_too_long_is_ended(forking, folder):
    begin = time.monotonic()
    assert forking.ended(folder, "-c", "import time; time.sleep(600)", seconds=0.5).returncode == -signal.SIGKILL
    assert time.monotonic() - begin < 300

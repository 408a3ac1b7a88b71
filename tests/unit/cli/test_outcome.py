"""How verbs end: exit codes, one message on stderr, stdout for the result alone."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import typer
from rich.text import Text
from typer.testing import CliRunner

from quern.cli import main as cli
from quern.cli.terminal.outcome import end_by_exception, global_options, plain, show, verb, working
from quern.core.errors import BadFileError, QuernError, UserError


def run_verb(error=None, resumes=False, body=None, arguments=()):
    """Run an application that has one verb, which raises ``error`` or runs ``body``."""
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @verb("quern job", resumes=resumes)
    def job():
        if body:
            body()
        if error:
            raise error

    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("group_size 7 is not allowed"), 2, "error: group_size 7 is not allowed"),
        (BadFileError("a.safetensors", "is truncated"), 2, "error: a.safetensors: is truncated"),
        (QuernError("the engine broke"), 1, "error: the engine broke"),
        (PermissionError(13, "Permission denied", "/root/x"), 1, "error: Permission denied: /root/x"),
        (OSError("no errno at all"), 1, "error: no errno at all"),
        (
            MemoryError(),
            1,
            "error: out of memory; give a cap with --memory where the verb has it, or close other programs",
        ),
    ],
)
def test_errors_are_one_message_and_a_code(error, code, message):
    ended = run_verb(error)
    assert (ended.exit_code, ended.stderr.strip(), ended.stdout) == (code, message, "")


def test_unexpected_errors_say_how_to_report_them():
    ended = run_verb(ZeroDivisionError("division\nby zero"))
    assert ended.exit_code == 1
    assert len(ended.stderr.splitlines()) == 1
    assert "internal error: ZeroDivisionError: division by zero" in ended.stderr
    assert "quern --debug" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("error", [ZeroDivisionError("oops"), UserError("wrong")])
def test_debug_shows_the_traceback(monkeypatch, error):
    monkeypatch.setattr(global_options, "debug", True)
    assert run_verb(error).exception is error


@pytest.mark.parametrize("resumes", [True, False])
def test_interruption_says_whether_the_command_continues(resumes):
    ended = run_verb(KeyboardInterrupt(), resumes)
    assert ended.exit_code == 130
    assert ended.stderr.startswith("interrupted.")
    assert ("same command continues" in ended.stderr) is resumes


def test_an_exit_code_of_the_verb_itself_stays():
    assert run_verb(typer.Exit(1)).exit_code == 1


def test_what_libraries_print_goes_to_stderr():
    def body():
        with working():
            print("chatter")
        show({"answer": 42}, True, str)

    ended = run_verb(body=body)
    assert json.loads(ended.stdout) == {"answer": 42}
    assert ended.stderr == "chatter\n"


def test_what_libraries_in_c_print_goes_to_stderr(capfd):
    def body():
        with working():
            ctypes.CDLL(None).puts(b"chatter")
        os.write(1, b"result")

    run_verb(body=body)
    assert capfd.readouterr() == ("result", "chatter\n")


def test_paths_and_messages_are_not_markup():
    ended = run_verb(UserError("no file [bold]x[/bold] :smile:"))
    assert ended.stderr == "error: no file [bold]x[/bold] :smile:\n"
    ended = run_verb(body=lambda: show({}, False, lambda _: Text("[red]x")))
    assert ended.stdout == "[red]x\n"


def test_json_refuses_numbers_that_json_has_not():
    assert run_verb(body=lambda: show({"x": float("nan")}, True, str)).exit_code == 1


LINE = "word " * 60


@pytest.mark.parametrize(("columns", "lines"), [(None, 1), ("50", 6), ("500", 1)])
def test_what_is_piped_is_cut_nowhere_but_at_columns(columns, lines, monkeypatch):
    """Whoever reads a pipe has no width, unless COLUMNS gives one."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    ended = run_verb(body=lambda: show({}, False, lambda _: Text(LINE.strip())))
    assert len(ended.stdout.splitlines()) == lines


def test_plain_data():
    @dataclass
    class Pair:
        path: Path
        items: tuple[int, ...]

    assert plain({"pair": Pair(Path("a/b"), (1, 2)), 3: None}) == {"pair": {"path": "a/b", "items": [1, 2]}, "3": None}


USER_ERRORS = [
    (["quantize"], "Missing argument"),
    (["quantize", "m", "-o", "x", "--profile", "nope"], "no recipe 'nope': neither a file nor one of the shipped ones"),
    (["quantize", "m", "-o", "x", "--recipe", "nope.yaml"], "no recipe 'nope.yaml'"),
    (["quantize", "m", "-o", "x", "--memory", "lots"], "--memory 'lots' is not a size"),
    (["quantize", "m", "-o", "x", "--device", "tpu"], "tpu"),
    (["quantize", "m", "-o", "x", "--threads", "0"], "--threads"),
    (["generate", "m", "--prompt", "x", "--threads", "99999999"], "--threads"),
    (["quantize", "m", "-o", "x", "--calibration", "nope.txt"], "nope.txt"),
    (["compare", "m", "-o", "x", "--recipes", " , "], "names no recipe"),
    (["recommend", "nope.json", "--scenario", "storage"], "nope.json"),
    (["recommend", "nope.json", "--scenario", "taste"], "taste"),
    (["inspect", "nope"], "nope"),
    (["compres", "m"], "compare"),
]


@pytest.mark.parametrize(("arguments", "said"), USER_ERRORS, ids=[" ".join(words) for words, _ in USER_ERRORS])
def test_mistakes_of_the_user(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200"})
    assert ended.exit_code == 2, ended.stderr
    assert said in ended.stderr
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_as_a_process(tmp_path):
    """The console script itself: a bad path, in a terminal that knows ASCII only."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", "from quern.cli.main import run; run()", "inspect", "m\u00fchle"]
    ended = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment, timeout=60)
    assert ended.returncode == 2
    assert b"m\\xfchle" in ended.stderr
    assert b"Traceback" not in ended.stderr


BROKEN_PIPE = """
import sys
import typer
from quern.cli.terminal.outcome import verb
app = typer.Typer()

@app.command()
@verb("quern job")
def job():
    for _ in range(100_000):
        print("a line that nobody reads")

app()
"""


def test_a_reader_that_leaves_early():
    process = subprocess.Popen([sys.executable, "-c", BROKEN_PIPE], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 1
    assert said == b""


WORKING = """
import sys, tempfile
import typer
from quern.cli.terminal.outcome import end_by_exception, verb, working
from quern.comparison.worker_process import Launch, Worker
app = typer.Typer()
end_by_exception()

@app.command()
@verb("quern job", resumes=True)
def job():
    command = (sys.executable, "-c", "import time; time.sleep(600)")
    with working(), tempfile.TemporaryDirectory(dir=sys.argv[1]), Worker("contender", Launch(command=command)) as worker:
        print(worker.process_id, flush=True)
        worker.ask({})

app(sys.argv[2:])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_whoever_ends_it_ends_its_processes_too(number, code, tmp_path):
    command = [sys.executable, "-c", WORKING, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    worker = int(process.stderr.readline())
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in said
    assert "The same command continues where this one stopped." in said
    assert not psutil.pid_exists(worker)
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    try:
        end_by_exception()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGTERM, before[1])

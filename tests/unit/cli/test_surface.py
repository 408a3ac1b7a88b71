"""The whole surface of the command line, pinned: a new verb or option is a decision, so it changes this file too."""

import shlex

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from quern.cli.main import VERBS, app

HELP = {"--help", "-h"}
SPECULATION = {"--speculate", "--draft", "--draft-tokens"}
TARGET = {"--bits", "--fit", "--context", "--max-loss", "--min-speed", "--cache"}
SURFACE = {
    "plan": {
        *(
            "MODEL",
            "--output",
            "-o",
            "--recipe",
            "--calibration",
            "--calibration-tokens",
            "--calibration-time",
            "--memory",
            "--seed",
            "--fresh",
            "--threads",
            "--format",
            "--format-option",
            "--json",
            "--ray",
            "--stream",
        ),
        *TARGET,
    },
    "quantize": {
        *(
            "MODEL",
            "--output",
            "-o",
            "--profile",
            "--recipe",
            "--calibration",
            "--calibration-tokens",
            "--calibration-time",
            "--memory",
            "--device",
            "--seed",
        ),
        *("--fresh", "--threads", "--format", "--format-option", "--stream", "--json", "--on-unhealthy", "--ray"),
        *TARGET,
    },
    "train": {
        *("MODEL", "--output", "-o", "--recipe", "--from", "--text", "--train", "--tokens", "--passes"),
        *("--learning-rate", "--memory", "--seed", "--fresh", "--threads", "--json", "--on-unhealthy", "--stream"),
    },
    "forecast": {"MODEL", "--recipe", "--on", "--context", "--format", "--calibration-tokens", "--threads", "--json"},
    "export": {"PATH", "--output", "-o", "--format", "--format-option", "--keep-padding", "--fresh", "--json"},
    "evaluate": {
        *("MODEL", "--reference", "--text", "--choice", "--tokens", "--threads", "--engine", "--seed", "--json"),
        *("--no-speed", "--tasks", "--tasks-path", "--limit", "--cache"),
    },
    "compare": {
        *(
            "MODEL",
            "--output",
            "-o",
            "--recipes",
            "--calibration",
            "--calibration-tokens",
            "--calibration-time",
            "--text",
            "--choice",
            "--tokens",
            "--scenario",
        ),
        *(
            "--memory",
            "--threads",
            "--engine",
            "--seed",
            "--fresh",
            "--json",
            "--peers",
            "--quick",
            "--no-speed",
            "--recipe",
            "--peer-time-limit",
            "--cache",
            "--ray",
        ),
    },
    "report": {"RESULTS.json", "--output", "-o", "--json"},
    "recommend": {
        *("RESULTS.json", "--scenario", "--weights", "--max-size", "--max-memory", "--max-loss", "--min-agreement"),
        *("--min-speed", "--for", "--licence", "--json", "--context", "--model", "--hardware"),
    },
    "inspect": {"PATH", "--stream", "--json"},
    "status": {"OUT", "--json"},
    "generate": {
        *("PATH", "--prompt", "--max-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--threads", "--json"),
        *("--engine", "--cache"),
        *SPECULATION,
    },
    "chat": {
        *("PATH", "--system", "--max-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--threads", "--json"),
        *("--engine", "--cache"),
        *SPECULATION,
    },
    "write": {
        *("PATH", "--output", "-o", "--text", "--tokens", "--begin", "--length", "--temperature", "--top-k", "--top-p"),
        *("--seed", "--fresh", "--threads", "--engine", "--json"),
    },
    "serve": {
        *("MODEL...", "--host", "--port", "--api-key", "--context", "--parallel", "--queue", "--loaded", "--threads"),
        *("--engine", "--cache", "--memory", "--pooling"),
        *SPECULATION,
    },
    "probe": {"--json"},
    "recipes": {"--json"},
    "check": {"[RECIPE]", "--for", "--cache", "--model", "--tensor-parallel", "--matrix", "--json"},
}
BENCH = {
    "serve": {
        *("[MODEL]", "--url", "--name", "--api-key", "--concurrency", "--rates", "--requests", "--prompt-tokens"),
        *("--answer-tokens", "--shared-prefix", "--seed", "--parallel", "--threads", "--engine", "--cache", "--output"),
        *("-o", "--json"),
    }
}
PEERS = {"list": {"--json"}, "install": {"NAME...", "--json"}, "remove": {"NAME...", "--json"}, "doctor": {"--json"}}
BEFORE_THE_VERB = {"--debug", "--version", "--language"}
NAMES = [function.__name__ for function in VERBS]


def parameters(command):
    return {
        name
        for parameter in command.params
        for name in ([parameter.metavar] if parameter.param_type_name == "argument" else parameter.opts)
    } - HELP


def test_verbs_and_their_options():
    group = get_command(app)
    verbs = dict(group.commands)
    bench, peers = verbs.pop("bench"), verbs.pop("peers")
    assert {name: parameters(command) for name, command in verbs.items()} == SURFACE
    assert {name: parameters(command) for name, command in bench.commands.items()} == BENCH
    assert {name: parameters(command) for name, command in peers.commands.items()} == PEERS
    assert parameters(group) == BEFORE_THE_VERB


def test_every_verb_prints_json():
    """But for the server, which answers in it."""
    assert {name for name, options in {**SURFACE, **PEERS}.items() if "--json" not in options} == {"serve"}


@pytest.mark.parametrize("name", NAMES)
def test_help_ends_with_an_example_that_parses(name):
    function = next(function for function in VERBS if function.__name__ == name)
    words = shlex.split(function.example)
    assert words[:2] == ["quern", name]
    assert {word for word in words if word.startswith("-")} <= SURFACE[name]
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    assert f"Example: {function.example}" in shown.stdout
    assert shown.stderr == ""


def test_help_of_the_least_speed_says_what_is_refused():
    shown = CliRunner().invoke(app, ["recommend", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    (line,) = [line for line in shown.stdout.splitlines() if "--min-speed" in line]
    assert "above 0" in line
    assert "x>=0" not in line


def test_help_of_the_whole_names_every_verb():
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert all(name in shown.stdout for name in NAMES)


def test_version():
    import quern

    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.stdout) == (0, f"quern {quern.__version__}\n")

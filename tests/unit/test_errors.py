"""Messages name options as whoever reads them knows them, and only through ``option``."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import quern
from quern.cli.main import app
from quern.core.errors import BadFileError, OutOfMemoryCapError, QuernError, UserError, option
from quern.generation.chat import Chat
from quern.serving.benchmark.measure import bench_serve
from quern.serving.benchmark.results import Load, Workload
from quern.serving.server import Served

SOURCE = Path(quern.__file__).parent


@pytest.mark.parametrize(
    "kind", [QuernError, UserError, lambda text: BadFileError("f", text), lambda text: OutOfMemoryCapError(text, 1)]
)
def test_each_reader_is_told_its_own_spelling(kind):
    error = kind(f"give {option('fresh=True', '--fresh')} or {option('memory=1', '--memory 1B')} now")
    assert str(error).endswith("give fresh=True or memory=1 now")
    assert error.on_command_line.endswith("give --fresh or --memory 1B now")
    again = UserError(f"worker: {error.message}")
    assert (str(again), again.on_command_line) == (f"worker: {error}", f"worker: {error.on_command_line}")


def test_what_users_wrote_stays_as_it_is():
    error = UserError("a {brace}, a %s, \\1 and \x02half")
    assert str(error) == error.on_command_line == "a {brace}, a %s, \\1 and \x02half"


def test_python_and_the_command_line_are_told_about_the_same_job(tmp_path):
    from tiny_model import tiny_config, write_model

    model = write_model(tmp_path / "model", tiny_config(num_hidden_layers=1))
    quern.quantize(model, tmp_path / "out", recipe="rtn4")
    with pytest.raises(UserError, match=r'recipe\.name: "rtn4" -> "fast"(?s:.*)pass fresh=True to replace') as caught:
        quern.quantize(model, tmp_path / "out", recipe="fast")
    assert "--" not in str(caught.value)
    shown = CliRunner().invoke(app, ["quantize", str(model), "-o", str(tmp_path / "out"), "--recipe", "fast"])
    assert shown.exit_code == 2
    assert "pass --fresh to replace it" in shown.stderr
    assert "fresh=True" not in shown.stderr


def _modules():
    for path in sorted(SOURCE.rglob("*.py")):
        where = path.relative_to(SOURCE)
        if where.parts[0] not in ("cli", "peers"):
            yield where, ast.parse(path.read_text("utf-8"))


def _spellings():
    """Both arguments of every call of ``option``; parts that are computed are left out."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "option":
                yield str(path.relative_to(SOURCE)), *("".join(_constants(argument)) for argument in node.args)


def _constants(node):
    return [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def test_no_message_below_the_command_line_names_its_options_directly():
    found = []
    for where, tree in _modules():
        inside = {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "option"
            for part in ast.walk(node)
        }
        raised = [part for node in ast.walk(tree) if isinstance(node, ast.Raise) for part in ast.walk(node)]
        found += [
            f"{where}: {part.value}"
            for part in raised
            if isinstance(part, ast.Constant) and isinstance(part.value, str) and id(part) not in inside
            if re.search(r"(^|[\s`(])--[a-z]", part.value)
        ]
    assert not found


def test_both_spellings_exist():
    group = get_command(app)
    verbs = [each for one in group.commands.values() for each in (one, *getattr(one, "commands", {}).values())]
    flags = {flag for command in verbs for parameter in command.params for flag in parameter.opts}
    functions = (
        quern.check,
        quern.quantize,
        quern.compare,
        quern.evaluate,
        quern.export,
        quern.forecast,
        quern.generate,
        quern.place,
        quern.recommend,
        quern.train,
        quern.write_text,
        Chat.__init__,
        Served.__init__,
        bench_serve,
        Load,
        Workload,
    )
    arguments = {name for function in functions for name in inspect.signature(function).parameters}
    spellings = list(_spellings())
    assert len(spellings) > 10
    for where, python, command in spellings:
        named = re.findall(r"--[a-z][a-z-]*", command)
        assert named, (where, command)
        assert set(named) <= flags, (where, command)
        assert re.match(r"\w+", python)[0] in arguments | {"quern"}, (where, python)

"""Both READMEs: commands that exist, Python that runs, links that lead somewhere, and the table's tool."""

import contextlib
import functools
import importlib.util
import io
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from sample_results import sample_results
from tiny_model import tiny_config, write_model
from typer.main import get_command
from typer.testing import CliRunner

import quern
from quern.advisor import hardware
from quern.cli.main import app
from quern.cli.terminal.outcome import INTERRUPTED

ROOT = Path(__file__).resolve().parents[3]
READMES = ("README.md", "README.zh-CN.md")
PAGES = [*READMES, "CONTRIBUTING.md", "ARCHITECTURE.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", READMES)
def test_the_first_block_is_the_two_commands(page):
    lines = [line.split("#")[0].strip() for line in blocks(page, "sh")[0].strip().splitlines()]
    assert lines == ["make demo", "make test"]


@pytest.mark.parametrize("page", READMES)
def test_commands_exist_with_their_options(page):
    commands = get_command(app).commands
    shown = [
        shlex.split(line) for block in blocks(page, "sh") for line in block.splitlines() if line.startswith("quern")
    ]
    assert {words[1] for words in shown} == set(commands)
    for words in shown:
        command = commands[words[1]]
        command = command.commands[words[2]] if hasattr(command, "commands") else command
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options


def test_both_languages_show_the_same_code():
    def code(page):
        return [re.sub(r"#.*", "", block) for kind in ("sh", "python") for block in blocks(page, kind)]

    assert code(READMES[0]) == code(READMES[1])


def commands() -> list[list[str]]:
    """Every line that begins with quern, in order, without the word."""
    lines = [line for block in blocks("README.md", "sh") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("quern ")]


CALIBRATION = ["--calibration-tokens", "2048"]
QUICKER = {
    "plan": CALIBRATION,
    "quantize": CALIBRATION,
    "train": ["--tokens", "2048"],
    "evaluate": ["--no-speed", "--tokens", "256"],
    "compare": ["--no-speed", "--tokens", "256", "--recipes", "rtn4", "--engine", "reference", *CALIBRATION],
}
"""What is added to a command, so that it takes seconds instead of minutes; the same for the functions:"""
QUICKER_QUANTIZATION = functools.partial(quern.quantize, calibration_tokens=2048)
QUICKER_EVALUATION = functools.partial(quern.evaluate, speed_rounds=0, tokens=256)


@pytest.mark.usefixtures("warm_workers")
def test_top_to_bottom_in_one_folder(tmp_path, monkeypatch):
    """As a reader does: every command, then both pieces of Python, none of which may stand in another's way.

    With a tiny model under the bundled one's name.
    """
    model = write_model(tmp_path / "models" / "python-7m", tiny_config(max_position_embeddings=1024))
    items = (ROOT / "models" / "python-7m" / "choice.jsonl").read_text("utf-8").splitlines(keepends=True)
    (model / "choice.jsonl").write_text("".join(items[:5]), "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hardware, "BUFFER_BYTES", 1 << 22)
    monkeypatch.setattr(hardware, "GEMM_SHAPE", (64, 64, 64))
    monkeypatch.setattr(quern, "quantize", QUICKER_QUANTIZATION)
    monkeypatch.setattr(quern, "evaluate", QUICKER_EVALUATION)
    for words in commands():
        quick = QUICKER.get(words[0], [])
        ended = CliRunner().invoke(app, [*words, *quick])
        if words[0] in ("chat", "serve"):
            assert ended.exit_code == 2, "there is no such model"
            assert "some-instruction-model" in ended.stderr
        elif words[0] != "recommend":  # of a model that knows nothing, nothing may be left to recommend
            assert ended.exit_code == 0, ended.stderr
        assert "Traceback" not in ended.stderr
    told = []
    for block in blocks("README.md", "python"):
        with contextlib.redirect_stdout(io.StringIO()) as written:
            exec(compile(block, "README.md", "exec"), {})
        told.append(written.getvalue())
    assert re.search(
        r"\d\d% smaller, \d\.\d\d bits per weight\nKL divergence \d+\.\d+, perplexity \d+\.\d+\n.", told[0]
    )
    assert told[1].startswith("def __iter__(self):")


@pytest.mark.parametrize("page", READMES)
def test_the_text_that_is_shown_is_what_the_model_says(page, tmp_path, monkeypatch):
    """The bundled model, unquantized, which takes seconds; the quantized ones say the same (tests/end_to_end)."""
    (words,) = [words for words in commands() if words[0] == "generate"]
    monkeypatch.chdir(ROOT)
    ended = CliRunner().invoke(app, ["generate", "models/python-7m", *words[2:]])
    assert ended.exit_code == 0, ended.stderr
    (shown,) = re.findall(r"\n```\n(def .*?)```\n", (ROOT / page).read_text("utf-8"), re.DOTALL)
    assert shown.rstrip("\n") == words[words.index("--prompt") + 1] + ended.stdout.rstrip()


def test_both_languages_have_the_same_parts():
    """Headings of the same levels, and below each the same code, links, numbered points and rows."""

    def parts(page):
        text = (ROOT / page).read_text("utf-8").replace("README.zh-CN.md", "README.md")
        sections = re.split(r"^(#+) .*$", text, flags=re.MULTILINE)
        return [
            (
                level,
                sorted(set(re.findall(r"\]\(([^)]+)\)", body))),
                len(re.findall(r"^\d\. ", body, re.MULTILINE)),
                len(re.findall(r"^\|", body, re.MULTILINE)),
                body.count("```"),
                {f"`{name}`" in body for name in ("--recipe", "--engine")},
            )
            for level, body in zip(sections[1::2], sections[2::2], strict=True)
        ]

    assert parts(READMES[0]) == parts(READMES[1])
    chinese = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / READMES[1]).read_text("utf-8"), flags=re.DOTALL)
    assert "token" not in chinese.lower(), "one word for it: 词元"


@pytest.mark.parametrize("page", READMES)
def test_every_exit_code_is_told(page):
    text = (ROOT / page).read_text("utf-8")
    assert all(re.search(rf"(?<!\d){code}[ （]?[(（]", text) for code in (0, 1, 2, INTERRUPTED))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    text = (ROOT / page).read_text("utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in target]
    missing = [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()]
    assert not missing


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "tools" / "update_readme.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["update_readme"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    for page in READMES:
        shutil.copy(ROOT / page, tmp_path)
    (tmp_path / "results.json").write_text(sample_results().model_dump_json(), "utf-8")
    return tmp_path


def test_the_table_of_the_results_goes_between_the_markers(tool, folder):
    results = sample_results()
    assert tool.main([str(folder / "results.json")], folder) == 0
    for page in READMES:
        before, now = (place.joinpath(page).read_text("utf-8") for place in (ROOT, folder))
        assert now.split(tool.BEGIN)[0] == before.split(tool.BEGIN)[0]
        assert now.split(tool.END)[1] == before.split(tool.END)[1]
        new = now.split(tool.BEGIN)[1].split(tool.END)[0]
        table = [line for line in new.splitlines() if line.startswith("|")]
        assert len(table) == 2 + len(results.rows)
        assert len({line.count("|") for line in table}) == 1
        assert all(row.name in line for row, line in zip(results.rows, table[2:], strict=True))
        assert f"**{results.recommendation.choice}**" in new
        best, second = results.recommendation.ranking[:2]
        told = new.split("**")[2]
        assert all(name in told for name in (best.name, second.name))
        assert all(figure in told for figure in ("+0.65", "3.99 MB", "71.9 %", "418", "1.29", "0.0284", "0.227", "1/3"))


def test_twice_is_once(tool, folder):
    tool.main([str(folder / "results.json")], folder)
    once = [(folder / page).read_text("utf-8") for page in READMES]
    tool.main([str(folder / "results.json")], folder)
    assert [(folder / page).read_text("utf-8") for page in READMES] == once


@pytest.mark.parametrize(
    "damage",
    [("<!-- demo-table:begin -->", ""), ("<!-- demo-table:end -->", "x" * 3), ("## ", "<!-- demo-table:end -->\n## ")],
)
def test_lost_markers_are_refused_and_nothing_is_written(tool, folder, damage, capsys):
    english, chinese = (folder / page for page in READMES)
    chinese.write_text(chinese.read_text("utf-8").replace(*damage), "utf-8")
    before = english.read_text("utf-8"), chinese.read_text("utf-8")
    assert tool.main([str(folder / "results.json")], folder) == 2
    assert "README.zh-CN.md" in capsys.readouterr().err
    assert (english.read_text("utf-8"), chinese.read_text("utf-8")) == before


def test_no_results(tool, folder, capsys):
    assert tool.main([str(folder / "nothing.json")], folder) == 2
    assert "nothing.json" in capsys.readouterr().err

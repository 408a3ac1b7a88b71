"""Both READMEs: commands that exist, Python that runs, links that lead somewhere, and the table's tool."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sample_results import sample_results
from tiny_model import tiny_config, write_model
from typer.main import get_command

from quern.cli.main import app

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


def test_python_examples_run(tmp_path):
    """With a tiny model under the bundled one's name, which takes seconds instead of a minute."""
    write_model(tmp_path / "models" / "python-7m", tiny_config(max_position_embeddings=1024))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    told = []
    for block in blocks("README.md", "python"):
        ended = subprocess.run(
            [sys.executable, "-W", "error::DeprecationWarning:quern", "-c", block],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert ended.returncode == 0, ended.stderr
        told.append(ended.stdout)
    assert re.search(
        r"\d\d% smaller, \d\.\d\d bits per weight\nKL divergence \d+\.\d+, perplexity \d+\.\d+\n.", told[0]
    )
    assert told[1].startswith("import")


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

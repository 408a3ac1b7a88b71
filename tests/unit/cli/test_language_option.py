"""The command line in another language: how it is asked for, and what stays English."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from sample_results import sample_results
from typer.main import get_command
from typer.testing import CliRunner, Result

from quern.advisor.forecasting.results import Forecast, ForecastMachine, Foretold, RecipeForecast
from quern.cli.main import VERBS, app
from quern.cli.terminal.language import REFUSALS, help_texts, language_first, refusal
from quern.cli.views import check as check_view
from quern.cli.views.forecast import FIGURES, forecast_view, placements_view
from quern.cli.views.plan import plan_report
from quern.cli.views.status import status as status_view
from quern.core.allocation import Target
from quern.core.recipe import load_recipe
from quern.core.text.language import english, gettext, speak, speaking
from quern.pipeline.forecasting.placement import place
from quern.pipeline.planning.plan import PlannedMatrix, PlanReport
from quern.pipeline.stacking.check import check
from quern.pipeline.stacking.matrix import matrix
from quern.pipeline.stacking.parts import parts_of
from quern.pipeline.status import JobStatus, Status, TaskStatus

MODEL = Path(__file__).parents[3] / "models" / "python-7m"
CHINESE = re.compile(r"[\u4e00-\u9fff]")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")
LOCALE = ("QUERN_LANGUAGE", "LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG")


@pytest.fixture(autouse=True)
def english_again(monkeypatch):
    monkeypatch.setenv("LANGUAGE", "")  # which a command in another language sets
    with english():
        yield


@pytest.fixture
def results(tmp_path) -> Path:
    path = tmp_path / "results.json"
    path.write_text(sample_results("overall").model_dump_json(), "utf-8")
    return path


def run(*words: object, **environment: str | None) -> Result:
    clean = dict.fromkeys(LOCALE) | {"COLUMNS": "200", "NO_COLOR": "1"}
    return CliRunner().invoke(app, [str(word) for word in words], env=clean | environment)


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["--language", "zh"], {}),
        (["--language", "zh_CN"], {"QUERN_LANGUAGE": "en"}),
        ([], {"QUERN_LANGUAGE": "zh", "LANG": "en_US.UTF-8"}),
        ([], {"LANG": "zh_CN.UTF-8"}),
        ([], {"LANGUAGE": "zh:en", "LANG": "en_US.UTF-8"}),
    ],
)
def test_ways_to_ask_for_it(words, environment, results):
    shown = run(*words, "recommend", results, **environment)
    assert shown.exit_code == 0
    assert "场景 overall 的推荐：balanced" in shown.stdout
    assert "推荐" in run(*words, "--help", **environment).stdout or words  # the option comes before --help


@pytest.mark.parametrize(
    "environment", [{}, {"LANG": "C.UTF-8"}, {"LANG": "de_DE.UTF-8"}, {"QUERN_LANGUAGE": "en", "LANG": "zh_CN"}]
)
def test_english_otherwise(environment, results):
    shown = run("recommend", results, **environment)
    assert "Recommended for the scenario overall: balanced" in shown.stdout
    assert not CHINESE.search(shown.output)


def test_a_language_that_is_not_there_is_refused(results):
    for shown in (run("--language", "xx", "recommend", results), run("recommend", results, QUERN_LANGUAGE="xx")):
        assert shown.exit_code == 2
        assert "no language is called 'xx'; there are en, zh" in shown.stderr


def test_json_is_the_same_bytes(results):
    here, there = run("recommend", results, "--json"), run("--language", "zh", "recommend", results, "--json")
    assert here.exit_code == there.exit_code == 0
    assert there.stdout == here.stdout
    assert json.loads(there.stdout)["choice"] == "balanced"


def test_errors(results):
    shown = run("--language", "zh", "recommend", results, "--max-size", "5")
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert shown.stderr == "错误：--max-size '5' 没有单位；请写 5GiB（或 5G）、5MB 或 5B\n"
    beside_json = run("--language", "zh", "recommend", results, "--max-size", "5", "--json")
    assert beside_json.stderr.startswith("error: --max-size '5' has no unit")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "请给出 quern compare 写出的 RESULTS.json；若未曾测量，请给出 --model MODEL"),
        (("x", "--model", "m", "--licence", "MIT"), "RESULTS.json、--licence 不能与 --model 同时给出。请去掉其中一方"),
        (("x", "y"), "多余的参数（y）"),
        (("x", "--maxsize", "3"), "没有选项 --maxsize（相近的选项：--max-loss, --max-size）"),
        (("x", "--max-size"), "选项 '--max-size' 需要一个值。"),
        (("x", "--min-speed", "a"), "'--min-speed' 的值无效：应为数字，无法解析为数"),
        (("x", "--context", "0"), "'--context' 的值无效：应不小于 1"),
        (
            ("x", "--scenario", "stor"),
            "--scenario 的值无效：没有名为 'stor' 的场景；可用的有 storage, speed, overall, mix；你是想写 'storage' 吗？",
        ),
    ],
)
def test_words_that_are_not_taken(words, told):
    """As the locked Typer words them; another one's words stay English."""
    shown = run("--language", "zh", "recommend", *words)
    assert shown.exit_code == 2
    assert told in shown.stderr


def test_an_argument_that_is_missing():
    shown = run("--language", "zh", "report", "-o", "report.html")
    assert shown.exit_code == 2
    assert "缺少参数 'RESULTS.json'。" in shown.stderr


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("recommend r.json --language zh --json", "--language zh recommend r.json --json"),
        ("recommend --language=zh r.json", "--language=zh recommend r.json"),
        ("--language zh recommend r.json", "--language zh recommend r.json"),
        ("recommend r.json --language", "--language recommend r.json"),
        ("generate m -- --language zh", "generate m -- --language zh"),
        ("recommend --json", "recommend --json"),
        ("", ""),
    ],
)
def test_the_option_may_come_behind_the_verb(words, wanted):
    assert language_first(words.split()) == wanted.split()


def test_refusals_are_as_they_were_in_english():
    for message in REFUSALS:
        assert refusal(message) == message
    assert refusal("whatever else: {x}") == "whatever else: {x}"


@pytest.mark.parametrize(("words", "heading"), [([], "─ 选项 ─"), (["--language", "en"], "─ Options ─")])
def test_typers_own_words_follow(words, heading):
    """In a process of its own, since Typer keeps what it has looked up."""
    command = [sys.executable, "-c", "from quern.cli.main import run; run()", "report", "--help", *words]
    environment = {name: value for name, value in os.environ.items() if name not in LOCALE} | {"LANG": "zh_CN.UTF-8"}
    shown = subprocess.run(
        command, env=environment | {"PYTHONUTF8": "1"}, capture_output=True, text=True, encoding="utf-8"
    )
    assert heading in shown.stdout


def test_a_page_is_for_people_whatever_is_printed(results, tmp_path):
    page = tmp_path / "report.html"
    shown = run("--language", "zh", "report", results, "-o", page, "--json")
    assert json.loads(shown.stdout) == {"report": str(page)}
    assert '<html lang="zh-Hans">' in page.read_text("utf-8")


@pytest.mark.parametrize("name", [function.__name__ for function in VERBS])
def test_help_is_translated_and_names_every_option(name):
    here, there = run(name, "--help"), run("--language", "zh", name, "--help")
    assert (here.exit_code, there.exit_code) == (0, 0)
    assert "示例：quern " in there.stdout
    options = re.compile(r"--[a-z][a-z-]+")
    assert set(options.findall(there.stdout)) == set(options.findall(here.stdout))
    lines = [" ".join(line.split()) for line in there.stdout.splitlines()]
    for text in help_texts(get_command(app).commands[name]):
        with speaking("zh"):
            translated = gettext(text)
        if translated != text:
            assert not any(line.endswith(text) for line in lines)


def same_numbers(view, *made):
    """``view`` of what ``made`` returns has the same numbers in both languages, and Chinese in one."""

    def shown():
        console = Console(width=10_000)
        with console.capture() as capture:
            console.print(view(*(one() for one in made)))
        return capture.get()

    here = shown()
    speak("zh")
    there = shown()
    assert sorted(NUMBER.findall(there)) == sorted(NUMBER.findall(here))
    assert CHINESE.search(there)
    return there


@pytest.mark.parametrize(
    ("recipe", "runtime", "cache"), [("balanced", "vllm", None), ("compact", None, "int8"), ("mxfp4", "vllm", None)]
)
def test_a_check(recipe, runtime, cache):
    same_numbers(check_view.report, lambda: check(recipe, runtime=runtime, cache=cache))


def test_sizes_of_tensor_parallel():
    found = check("fast", runtime="vllm", model=MODEL, tensor_parallel=3)
    told = same_numbers(check_view.report, lambda: found)
    assert "张量并行 1：可行" in told


def test_a_forecast():
    figure = Foretold(value=2048, unit="tokens", basis="predicted", derivation="8 x 256")
    none = Foretold(value=None, unit="tokens/s", basis="counted", derivation="no engine")
    one = RecipeForecast(
        recipe="compact", format="quern", runtime="quern", bits_per_weight=2.87, contexts={"int8": figure}, decode=none,
        **dict.fromkeys(FIGURES[:-1], figure), notes=["1 note"],
    )  # fmt: skip
    machine = ForecastMachine(name="m", kind="cpu", here=False, description="2 cores", memory_bytes=1 << 30)
    found = Forecast(
        quern_version="1", created="", model="models/m", architecture="qwen2", parameters=1234, bf16_bytes=2468,
        machine=machine, threads=2, context=256, recipes=[one], warnings=["1 warning"],
    )  # fmt: skip
    told = same_numbers(forecast_view, lambda: found)
    for text in ("量化所需内存", "最长上下文，int8 缓存", "2,048 个词元", "计数", "预测", "未知", "每个权重 2.87 比特"):
        assert text in told


def test_where_a_model_runs():
    found = place(MODEL, hardware=["desktop-16-core"], min_speed=7000)
    told = same_numbers(placements_view, lambda: found)
    for text in ("overall 场景的选择：", "容纳不下的，最接近的在前：", "别处的 KL"):
        assert text in told


def test_the_matrix():
    told = same_numbers(check_view.matrix, lambda: matrix(parts_of(load_recipe("compact"), "int8", "vllm")))
    assert "被拒绝" in told


def test_a_plan():
    report = PlanReport(
        recipe=load_recipe("balanced"),
        target=Target(bits=3, memory=24 << 30),
        matrices=[PlannedMatrix("lm_head", "integer 4 bits", {}, True, 1234, 0.0123)],
        bytes=123_456,
        bits_per_weight=3.014,
        compression=0.81,
        predicted_loss=0.0456,
        limit=None,
        smallest_bytes=100_000,
        memory_bytes=234_567,
        context=4096,
        tokens_per_s=12.5,
        seconds=7.0,
        notes=[],
    )  # fmt: skip
    told = same_numbers(plan_report, lambda: report)
    assert "每词元 0.0456 nats" in told


def test_jobs():
    task = TaskStatus("quantizing blocks", 3, 28, 65.0, 541.0)
    job = JobStatus(Path("out.quern-work"), Path("out"), "compact", 3, "block 2", 5_000_000, 4711, 2.0, [task])
    told = same_numbers(status_view, lambda: Status(Path("out"), False, [job]))
    assert "量化各块" in told
    assert "还剩 9 min 1 s" in told

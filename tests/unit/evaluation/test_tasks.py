"""Tasks of lm-eval: through a package that stands in for it, in real processes; and through itself where it is installed."""

import importlib.util
import io
import json
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from quern.checkpoint.tokenizer import load_tokenizer
from quern.cli.main import app
from quern.cli.views import results as render
from quern.core.errors import UserError
from quern.engines.base import ENGINES
from quern.evaluation.lm_eval import Requests
from quern.evaluation.tasks import NOT_INSTALLED, TaskList, check_tasks
from quern.pipeline import evaluate as module

pytestmark = pytest.mark.usefixtures("quiet_machine", "warm_workers")

PACKAGE = {
    "__init__": """
from types import SimpleNamespace

def simple_evaluate(model, tasks, task_manager, limit, log_samples, **seeds):
    if "broken" in tasks:
        raise ConnectionError("no\\nnetwork")
    asked = [SimpleNamespace(args=("The cat", " sat"), doc_id=n) for n in range(limit or 3)]
    found = [likelihood for likelihood, _ in model.loglikelihood(asked)]
    metrics = {"alias": "x", "acc,none": sum(found), "acc_stderr,none": "N/A", "nan,none": float("nan"), "sample_len": 3}
    strict = {"em,strict": len(found), "em_stderr,strict": seeds["random_seed"], "folder": task_manager.include_path}
    return {"results": {name: {**metrics, **strict} for name in tasks}}
""",
    "tasks": """
class TaskManager:
    def __init__(self, include_path):
        self.include_path = include_path
        self.all_tasks = ["hellaswag", "broken", *(["mine"] if include_path else [])]
""",
    "api/__init__": "",
    "api/model": "class LM:\n    pass\n",
}
TEXT = "Some text that a model can read, and a little more of it so that it suffices. " * 4


def forget(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package called lm_eval that this process finds, and those that it starts."""
    for name, code in PACKAGE.items():
        path = tmp_path / "packages" / "lm_eval" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    forget(monkeypatch)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"), prepend=":")
    yield
    forget(monkeypatch)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def run(model, text, *options):
    command = ["evaluate", str(model), "--text", str(text), "--tokens", "40", "--threads", "1", "--no-speed", *options]
    return CliRunner().invoke(app, command, env={"COLUMNS": "150"})


def test_from_the_command_line_to_the_row(tiny_model, text, tmp_path, stand_in):
    options = ("--tasks", "hellaswag,mine", "--tasks-path", str(tmp_path), "--limit", "2", "--seed", "7")
    ended = run(tiny_model, text, *options, "--engine", "reference", "--json")
    assert ended.exit_code == 0, ended.stderr
    row = json.loads(ended.stdout)
    assert list(row["tasks"]) == ["hellaswag", "mine"]
    scores = row["tasks"]["mine"]
    assert scores == {"acc": scores["acc"], "em,strict": 2.0, "em_stderr,strict": 7.0}
    # Two log-likelihoods of a few tokens out of 300, by a random model.
    assert -2 * 10 * 20 < scores["acc"] < 0
    assert row["kl_mean"] is not None, "all else is measured as without tasks"


def test_the_table_has_a_line_for_each_metric(sample_row):
    row = sample_row.model_copy(
        update={"tasks": {"mine": {"acc": 0.25, "acc_stderr": 0.125, "em,strict": 1.0, "em_stderr,strict": 0.5}}}
    )
    lines = [line.split() for line in shown(row) if line.startswith("mine")]
    assert lines == [["mine", "acc", "0.2500", "0.1250"], ["mine", "em,strict", "1.0000", "0.5000"]]
    assert "metric" not in " ".join(shown(sample_row))


def shown(row):
    console = Console(width=150, file=io.StringIO())
    console.print(render.row(row))
    return [line.strip() for line in console.file.getvalue().splitlines()]


@pytest.fixture
def sample_row():
    from sample_results import sample_results

    return sample_results().rows[0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--tasks", "hellaswagg"), "adds those of a folder; did you mean 'hellaswag'?"),
        (("--tasks", "mine"), "`lm-eval ls tasks` lists them; --tasks-path FOLDER adds"),
        (("--tasks", "hellaswag,hellaswag"), "--tasks: one or several names, each once"),
        (("--tasks", ""), "--tasks: one or several names, each once; got none"),
        (("--limit", "3"), "--limit is about tasks of lm-eval; name them with --tasks"),
        (("--tasks-path", "."), "--tasks-path is about tasks of lm-eval; name them with --tasks"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(options, told, tiny_model, text, stand_in, monkeypatch):
    monkeypatch.setattr(module, "open_model", lambda *_, **__: pytest.fail("the model was opened"))
    ended = run(tiny_model, text, *options)
    assert ended.exit_code == 2
    assert told in " ".join(ended.stderr.split())


def test_what_lm_eval_cannot_do_is_a_users_error(tiny_model, text, stand_in):
    ended = run(tiny_model, text, "--tasks", "broken", "--engine", "reference")
    assert ended.exit_code == 2
    assert "lm-eval cannot run broken: ConnectionError: no network" in " ".join(ended.stderr.split())


def test_without_lm_eval_it_is_said_how_to_get_it(tiny_model, text, monkeypatch):
    forget(monkeypatch)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    ended = run(tiny_model, text, "--tasks", "hellaswag")
    assert ended.exit_code == 2
    assert NOT_INSTALLED in ended.stderr
    assert "pip install 'quern[lm-eval]'" in NOT_INSTALLED


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        check_tasks(TaskList(names=("a",), folder=tmp_path / "none"))


def test_a_list_survives_the_way_to_the_worker(tmp_path):
    for tasks in (TaskList(names=("a", "b")), TaskList(names=("a",), folder=tmp_path, limit=3)):
        assert TaskList.from_json(json.loads(json.dumps(tasks.to_json()))) == tasks


LOCAL = """
task: first_letters
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
@pytest.mark.filterwarnings("default")
def test_a_local_task_in_the_real_package(tiny_model, text, tmp_path, monkeypatch):
    """Its accuracy is that of the likelihoods, which are computed here once more."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "tasks"
    folder.mkdir()
    items = [{"question": f"{letter} is", "choices": [" one", " two"], "answer": 0} for letter in "abcdefgh"]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "first_letters.yaml").write_text(LOCAL.replace("FILE", str(folder / "items.jsonl")))
    options = ("--tasks", "first_letters", "--tasks-path", str(folder), "--engine", "reference", "--json")
    ended = run(tiny_model, text, *options)
    assert ended.exit_code == 0, ended.stderr
    requests = Requests(ENGINES.get("reference")().load(tiny_model, threads=1), load_tokenizer(tiny_model))
    asked = [SimpleNamespace(args=(item["question"], choice)) for item in items for choice in item["choices"]]
    found = [likelihood for likelihood, _ in requests.loglikelihood(asked)]
    right = [first > second for first, second in zip(found[::2], found[1::2])]
    scores = json.loads(ended.stdout)["tasks"]["first_letters"]
    assert scores["acc"] == sum(right) / len(items)
    assert "acc_stderr" in scores

"""`quern bench serve` on servers that run, one that it starts, and one that is killed."""

import json
import os
import signal
from contextlib import contextmanager

import httpx
import pytest
from running_server import running, write_served_model
from typer.testing import CliRunner

from quern.cli.main import app
from quern.core.errors import UserError
from quern.serving.app import make_app
from quern.serving.benchmark import measure
from quern.serving.benchmark.measure import bench_serve
from quern.serving.benchmark.own_server import OwnServer, own_server
from quern.serving.benchmark.results import Load, Workload
from quern.serving.model import ServedModel
from quern.serving.models import Models
from quern.serving.scheduler import Limits
from quern.serving.server import Served

SMALL = Workload(prompt_tokens=40, answer_tokens=6, shared_prefix=0.5, requests=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_served_model(tmp_path_factory.mktemp("measured") / "tiny")


@pytest.fixture(scope="module")
def server(model):
    limits = Limits(parallel=3, waiting=40)
    with running(
        make_app(Models({"tiny": lambda: ServedModel(model, "tiny", threads=1, limits=limits)}), "key")
    ) as url:
        yield url


class Interrupting:
    """Progress that presses Ctrl-C after a number of answers."""

    def __init__(self, after):
        self.left = after

    def log(self, message):
        pass

    def task(self, *_):
        return self

    def advance(self, steps=1):
        self.left -= steps
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)

    def done(self):
        pass


def test_every_request_is_counted_under_both_kinds_of_load(server):
    found = bench_serve(url=server, key="key", workload=SMALL, loads=[Load(concurrency=2), Load(rate=200.0)])
    assert not found.interrupted
    assert (found.server.model, found.server.path) == ("tiny", None)
    for load in found.loads:
        assert (load.completed, load.failed) == (5, 0), load.errors
        assert (load.prompt_tokens, load.answer_tokens) == (5 * 40, 5 * 6)
        assert load.cached_tokens == 5 * 16  # one whole block of the 20 tokens that all share
        assert 0 < load.ttft_ms.median <= load.ttft_ms.p99 <= 1000 * load.seconds
        assert load.ttft_ms.mean < load.e2el_ms.mean
        assert load.output_throughput == pytest.approx(30 / load.seconds)


def test_interrupted_it_tells_what_was_measured(server):
    loads = [Load(concurrency=1), Load(concurrency=1), Load(concurrency=1)]
    found = bench_serve(url=server, key="key", workload=SMALL, loads=loads, progress=Interrupting(7))
    assert found.interrupted
    assert [load.completed for load in found.loads] == [5, 2]
    with pytest.raises(KeyboardInterrupt):
        bench_serve(url=server, key="key", workload=SMALL, loads=loads, progress=_InterruptingAtOnce())


class _InterruptingAtOnce(Interrupting):
    def __init__(self):
        super().__init__(0)

    def task(self, *_):
        os.kill(os.getpid(), signal.SIGINT)
        return self


def test_what_a_server_refuses_is_told(server):
    with pytest.raises(UserError, match=r"wants a key; give it as key"):
        bench_serve(url=server, workload=SMALL)
    with pytest.raises(UserError, match="there is no model 'other'"):
        bench_serve(url=server, key="key", name="other", workload=SMALL)
    with pytest.raises(UserError, match="the context is 512"):
        bench_serve(url=server, key="key", workload=Workload(prompt_tokens=600, requests=1))


def test_command_with_a_model_of_its_own(model, server, tmp_path, monkeypatch):
    """Whose server is the one that runs already: the README's command starts one."""

    @contextmanager
    def started(served):
        assert (dict(served.models), served.port, served.threads) == ({"tiny": str(model)}, 0, 1)
        yield OwnServer(server, None)

    monkeypatch.setattr(measure, "own_server", started)
    monkeypatch.setenv("QUERN_API_KEY", "key")
    words = ["bench", "serve", str(model), "--prompt-tokens", "20", "--answer-tokens", "4", "--requests", "3"]
    words += ["--concurrency", "1,2", "--rates", "100", "--threads", "1"]
    ended = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "found.json"), "--json"])
    assert ended.exit_code == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found == json.loads((tmp_path / "found.json").read_text())
    assert [load["completed"] for load in found["loads"]] == [3, 3, 3]
    assert found["server"]["path"] == str(model)
    again = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "found.json")])
    assert again.exit_code == 2
    assert "exists; choose another --output" in again.stderr


def test_command_on_a_server(server, monkeypatch):
    monkeypatch.setenv("QUERN_API_KEY", "key")
    words = ["bench", "serve", "--url", server, "--prompt-tokens", "20", "--requests", "3"]
    ended = CliRunner().invoke(app, [*words, "--answer-tokens", "4", "--concurrency", "2"], env={"COLUMNS": "200"})
    assert ended.exit_code == 0, ended.stderr
    assert "tiny at http://127.0.0.1" in ended.stdout
    assert "2 at once" in ended.stdout
    for wrong in (["--concurrency", "1.5"], ["--rates", "x"], ["--rates", "nan"], ["--concurrency", "0"]):
        assert CliRunner().invoke(app, [*words, *wrong]).exit_code == 2
    assert CliRunner().invoke(app, ["bench", "serve"]).exit_code == 2


def test_a_model_that_cannot_be_served(tmp_path):
    with pytest.raises(UserError, match="nothing"), own_server(Served({"x": str(tmp_path / "nothing")}, port=0)):
        raise AssertionError("it is not served")


def test_killed_and_started_again_it_answers_as_before(model):
    asked = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0, "ignore_eos": True}

    def answer(url):
        return httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()["choices"][0]["text"]

    with own_server(Served({"tiny": str(model)}, port=0, threads=1)) as first:
        before = answer(first.url)
        long = {**asked, "max_tokens": 400, "stream": True}
        with httpx.stream("POST", f"{first.url}/v1/completions", json=long, timeout=60) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            first.process.kill()
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        port = int(first.url.rpartition(":")[2])
        with own_server(Served({"tiny": str(model)}, port=port, threads=1)) as second:
            assert second.url == first.url
            assert answer(second.url) == before
            second.process.stdin.close()  # as when whoever started it is gone
            assert second.process.wait(20) in (0, -signal.SIGTERM)

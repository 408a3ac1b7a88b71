"""Requests that no client would send, and clients that do not come to the point: the server refuses them and goes on."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from repository_tools import load_tool
from running_server import running, write_served_model

from quern.serving.api import streaming
from quern.serving.app import MOST_VALUES, make_app
from quern.serving.connections import ImpatientProtocol
from quern.serving.model import ServedModel
from quern.serving.models import Models
from quern.serving.scheduler import Limits

PATIENCE = 2.0
COUNT = 240
TOOL = load_tool("malformed_requests")


class Impatient(ImpatientProtocol):
    """With less of it."""

    patience = PATIENCE


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = write_served_model(tmp_path_factory.mktemp("malformed") / "tiny", max_position_embeddings=4096)
    limits = Limits(parallel=2, waiting=40)
    models = Models({"tiny": lambda: ServedModel(model, "tiny", threads=1, limits=limits)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "SLOWEST", PATIENCE)
        with running(make_app(models, patience=PATIENCE), http=Impatient, send_buffer=16384) as url:
            yield url


@pytest.fixture(scope="module")
def raw(server):
    with httpx.Client(base_url=server, timeout=60) as made:
        yield made


def address(server):
    host, port = server.removeprefix("http://").split(":")
    return host, int(port)


def figure(raw, name):
    (line,) = (line for line in raw.get("/metrics").text.splitlines() if line.startswith(name + "{"))
    return float(line.rpartition(" ")[2])


def until_idle(raw, seconds=20):
    """Wait until nothing is answered and nothing waits."""
    deadline = time.monotonic() + seconds
    while figure(raw, "quern_running") or figure(raw, "quern_waiting"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_same_seed_makes_the_same_requests():
    first, again, other = (list(TOOL.malformed_requests(seed, 60)) for seed in (1, 1, 2))
    assert first == again != other


def test_the_bodies_that_they_are_made_of_are_answered(raw):
    for path, body in TOOL.BODIES.items():
        assert raw.post(path, json=body).status_code == 200


def test_malformed_requests_get_errors_of_their_protocol(server, raw):
    def told(sent):
        return TOOL.problem(sent, TOOL.send(*address(server), sent.raw, 30 if sent.whole else 0.2))

    requests = list(TOOL.malformed_requests(18, COUNT))
    with ThreadPoolExecutor(8) as pool:
        problems = [
            f"{sent.name}, {sent.path}: {wrong}\n{sent.raw[:600]!r}"
            for sent, wrong in zip(requests, pool.map(told, requests), strict=True)
            if wrong
        ]
    assert problems == []
    assert raw.get("/health").status_code == 200
    until_idle(raw)


def test_the_judge_of_answers_can_refuse():
    sent = TOOL.Malformed("x", b"", "/v1/messages")
    right = b'HTTP/1.1 400 Bad Request\r\n\r\n{"type": "error", "error": {"type": "x", "message": "y"}}'
    assert TOOL.problem(sent, right) is None
    for wrong in (
        *(b"", b"HTTP/1.1 200 OK\r\n\r\n{}", b"HTTP/1.1 500 Oh\r\n\r\n{}", b"HTTP/1.1 400 Bad\r\n\r\nno JSON"),
        b'HTTP/1.1 400 Bad Request\r\n\r\n{"error": {"type": "x", "message": "y"}}',
    ):
        assert TOOL.problem(sent, wrong)


def called(arguments):
    function = {"name": "f", "arguments": arguments}
    return [{"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": function}]}]


def nested(depth):
    schema = b'{"type": "object", "properties": {"a": ' * depth + b"{}" + b"}}" * depth
    hello = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "response_format": '
    return hello + b'{"type": "json_schema", "json_schema": {"schema": ' + schema + b"}}}"


HOSTILE = {
    "half a surrogate pair in arguments": ("/v1/chat/completions", json.dumps({"messages": called('{"a": "\\ud800"}')})),
    "half a surrogate pair in a key": ("/v1/completions", '{"prompt": "x", "logit_bias": {"\\ud800": 1}}'),
    "half a surrogate pair in a tool": ("/v1/messages", '{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, '
                                                        '"tools": [{"name": "f", "input_schema": {"a": "\\ud800"}}], '
                                                        '"tool_choice": {"type": "tool", "name": "\\ud800"}}'),
    "arguments nested deeply": ("/v1/chat/completions", json.dumps({"messages": called("[" * 20_000 + "]" * 20_000)})),
    "a schema nested deeply": ("/v1/chat/completions", nested(400)),
    "a schema nested more deeply": ("/v1/chat/completions", nested(5000)),
    "a token below all": ("/v1/completions", '{"prompt": [-1], "echo": true}'),
    "a token above all": ("/v1/completions", json.dumps({"prompt": [[1], [10**30]]})),
    "a long name": ("/v1/completions", json.dumps({"prompt": "x", "model": "m" * 100_000})),
    "many numbers that are none": ("/detokenize", '{"tokens": [' + '"a",' * 400_000 + "1]}"),
    "many messages that are none": ("/v1/chat/completions", '{"messages": [' + "1," * 400_000 + "1]}"),
    "many tools that are none": ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "x"}], "tools": ['
                                                         + "1," * 400_000 + "1]}"),
    "more tools than are taken": ("/v1/messages", json.dumps({
        "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "tools": [{"name": "f", "input_schema": {}}] * 129,
    })),
    "many parts that are none": ("/v1/messages", '{"max_tokens": 1, "messages": [{"role": "user", "content": ['
                                                 + "1," * 400_000 + "1]}]}"),
    "many biases that are none": ("/v1/completions", '{"prompt": "x", "logit_bias": {'
                                                     + ",".join(f'"{n}": "x"' for n in range(200_000)) + "}}"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_are_refused(raw, name):
    path, body = HOSTILE[name]
    found = raw.post(path, content=body, headers={"content-type": "application/json"})
    assert found.status_code == 400, found.text[:500]
    assert len(found.text) < 5000
    assert (found.json().get("type") == "error") == path.startswith("/v1/messages")


def test_a_body_of_many_small_values_is_refused_before_it_is_parsed(raw):
    for path in ("/v1/completions", "/v1/messages"):
        found = raw.post(path, content=b'{"a": [' + b"[]," * MOST_VALUES + b"1]}")
        assert found.status_code == 413
        assert "values" in found.json()["error"]["message"]

    def pieces():  # without a length
        for _ in range(40):
            yield b" " * (1 << 20)

    found = raw.post("/v1/completions", content=pieces())
    assert found.status_code == 413
    assert "bytes" in found.json()["error"]["message"]


def test_slow_senders_are_closed_and_others_are_answered_meanwhile(server, raw):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    get = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    begin = time.monotonic()
    slow = [socket.create_connection(address(server), timeout=30) for _ in range(120)]
    for number, connection in enumerate(slow):
        connection.sendall((b"GET /health HTTP/1.1\r\nX", head, get)[number % 3])
    assert raw.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
    ended = []
    for number, connection in enumerate(slow):
        if number % 3 == 2:  # a second request, begun on a connection that was answered once
            assert connection.recv(9) == b"HTTP/1.1 "
            connection.sendall(b"GET /he")
    for connection in slow:
        found = b""
        while piece := connection.recv(65536):
            found += piece
        ended.append(found)
        connection.close()
    assert ended[0] == b""
    assert ended[1].startswith(b"HTTP/1.1 408 ")
    assert b'"error"' in ended[1]
    assert time.monotonic() - begin >= PATIENCE


def test_the_place_of_a_whole_answer_is_free_when_its_client_goes(server, raw):
    """Both places are taken by answers of which nobody waits for the end."""
    messages = [{"role": "user", "content": "x"}]
    for path in ("/v1/completions", "/v1/chat/completions"):
        asked = {"prompt": "x", "messages": messages, "max_tokens": 3900, "ignore_eos": True}
        for _ in range(2):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{server}{path}", json=asked, timeout=httpx.Timeout(30, read=0.3))
        until_idle(raw)


def test_who_does_not_read_is_given_up(server, raw):
    """Answers are paused while their clients do not read, and keep their places, but not for ever."""
    asked = json.dumps({"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True, "logprobs": 9}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    deaf = []
    for _ in range(2):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address(server))
        connection.sendall(head % len(asked) + asked)
        deaf.append(connection)
    before = figure(raw, "quern_written_tokens_total")
    while figure(raw, "quern_running") < 2:
        time.sleep(0.01)
    assert raw.post("/v1/completions", json={"prompt": "y", "max_tokens": 2}).status_code == 200
    assert figure(raw, "quern_written_tokens_total") - before < 8000, "they were not paused"
    for connection in deaf:
        connection.close()
    until_idle(raw)

"""The server as clients see it: OpenAI's and Anthropic's own, and requests that no client would send."""

import json
import random
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anthropic
import httpx
import openai
import pytest
from running_server import running, write_served_model

from quern.serving.app import make_app
from quern.serving.model import ServedModel
from quern.serving.models import Models
from quern.serving.scheduler import Limits

KEY = "secret"
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Bonn"]}}, "required": ["city"]},
}
TOOLS = [{"type": "function", "function": TOOL}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_served_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(model):
    limits = Limits(parallel=3, waiting=40, prompt_tokens=32)
    models = Models({"tiny": lambda: ServedModel(model, "tiny", threads=1, limits=limits)})
    with running(make_app(models, KEY, largest=200_000)) as url:
        yield url


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def raw(server):
    with httpx.Client(base_url=server, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as made:
        yield made


def said(client, **options):
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 0, **options}
    return client.chat.completions.create(**asked)


def test_an_answer_whole_and_streamed_is_the_same_text(client):
    whole = said(client, logprobs=True, top_logprobs=2)
    chunks = list(said(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert whole.choices[0].message.content == text != ""
    assert whole.choices[0].finish_reason == chunks[-2].choices[0].finish_reason
    assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens <= 12
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    for one in whole.choices[0].logprobs.content:
        assert one.logprob == one.top_logprobs[0].logprob >= one.top_logprobs[1].logprob


def test_seeds_and_several_answers(client):
    options = {"temperature": 1.0, "n": 3, "seed": 5}
    first, again = (said(client, **options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in said(client, stream=True, **options):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_completions_of_texts_and_ids(client, raw):
    found = client.completions.create(
        model="tiny", prompt=["one two", "three"], max_tokens=6, temperature=0, logprobs=1
    )
    ids = raw.post("/tokenize", json={"prompt": "three"}).json()["tokens"]
    assert raw.post("/detokenize", json={"tokens": ids}).json()["prompt"] == "three"
    other = client.completions.create(model="tiny", prompt=ids, max_tokens=6, temperature=0, echo=True)
    assert other.choices[0].text == "three" + found.choices[1].text
    assert len(found.choices[0].logprobs.tokens) == len(found.choices[0].logprobs.token_logprobs)
    text = found.choices[0].text
    stopped = client.completions.create(model="tiny", prompt="one two", max_tokens=6, temperature=0, stop=[text[2:4]])
    assert stopped.choices[0].text == text[: text.index(text[2:4])]
    assert stopped.choices[0].finish_reason == "stop"


def test_answers_of_a_form(client):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    found = said(client, response_format=form, max_tokens=40)
    assert json.loads(found.choices[0].message.content)["n"] in (1, 2)
    assert found.choices[0].finish_reason == "stop"
    found = said(client, response_format={"type": "regex", "regex": "(yes|no)!"}, max_tokens=40)
    assert found.choices[0].message.content in ("yes!", "no!")
    with pytest.raises(openai.BadRequestError, match="regular expression"):
        said(client, response_format={"type": "regex", "regex": "("})


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tools_that_have_to_be_called(client, choice):
    found = said(client, tools=TOOLS, tool_choice=choice, max_tokens=120).choices[0]
    assert found.finish_reason == "tool_calls"
    (call,) = found.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Bonn")
    chunks = said(client, tools=TOOLS, tool_choice=choice, max_tokens=120, stream=True)
    deltas = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments


def test_responses(client):
    asked = {"model": "tiny", "input": "Hello", "max_output_tokens": 12, "temperature": 0}
    found = client.responses.create(**asked)
    assert found.output_text == said(client).choices[0].message.content
    with client.responses.stream(**asked) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == found.output_text
    tool = {"type": "function", "strict": True, **TOOL}
    called = client.responses.create(**{**asked, "max_output_tokens": 120}, tools=[tool], tool_choice="required")
    assert called.output[0].name == "weather"
    with pytest.raises(openai.BadRequestError, match="nothing is stored"):
        client.responses.create(**asked, previous_response_id="resp_1")


def test_messages(client, server):
    with anthropic.Anthropic(base_url=server, api_key=KEY, max_retries=0) as other:
        asked = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "extra_body": {"temperature": 0}}
        found = other.messages.create(**asked)
        assert found.content[0].text == said(client).choices[0].message.content
        assert (
            found.usage.input_tokens + found.usage.cache_read_input_tokens
            == other.messages.count_tokens(model="tiny", messages=HELLO).input_tokens
        )
        with other.messages.stream(**asked) as stream:
            assert "".join(stream.text_stream) == found.content[0].text
        tools = [{"name": "weather", "input_schema": TOOL["parameters"]}]
        called = other.messages.create(**{**asked, "max_tokens": 120}, tools=tools, tool_choice={"type": "any"})
        assert called.stop_reason == "tool_use"
        assert called.content[0].input["city"] in ("Rome", "Bonn")
        with pytest.raises(anthropic.NotFoundError):
            other.messages.create(**{**asked, "model": "other"})


def test_many_clients_get_what_a_lone_one_gets(client):
    draw = random.Random(0)
    common = "You know everything. " * 3
    texts = [common * draw.randrange(2) + str(draw.random()) for _ in range(24)]

    def answer(text):
        return said(client, messages=[{"role": "user", "content": text}], max_tokens=8).choices[0].message.content

    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(answer, texts))
    assert together == [answer(text) for text in texts]


def test_clients_that_go_leave_room_for_others(client, raw):
    for _ in range(4):
        stream = said(client, stream=True, max_tokens=400, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
    deadline = time.monotonic() + 30
    while 'quern_running{model="tiny"} 0.0' not in raw.get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert said(client).choices[0].message.content


def test_models_health_version_page(client, raw, server):
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert httpx.get(f"{server}/health").json() == {"status": "ok"}
    assert "<title>quern</title>" in httpx.get(server).text
    assert set(raw.get("/version").json()) == {"version"}
    assert "quern_written_tokens_total" in raw.get("/metrics").text


MALFORMED = {
    "no JSON": b"{",
    "a list": b"[]",
    "no messages": b"{}",
    "empty messages": b'{"messages": []}',
    "a number": b'{"messages": 5}',
    "a role": b'{"messages": [{"role": "king", "content": "x"}]}',
    "a picture": b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    "deep": b'{"messages": ' + b"[" * 5000,
    "tokens": b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}',
    "temperature": b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    "bias": b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"99999": 1}}',
    "stops": b'{"messages": [{"role": "user", "content": "x"}], "stop": ' + json.dumps(["x"] * 99).encode() + b"}",
    "n": b'{"messages": [{"role": "user", "content": "x"}], "n": 1000000}',
    "no tools": b'{"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}',
    "surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "bytes": b'\xff\xfe{"messages": 1}',
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_are_refused_in_the_form_of_the_protocol(raw, name):
    found = raw.post("/v1/chat/completions", content=MALFORMED[name], headers={"content-type": "application/json"})
    assert found.status_code == 400, found.text
    assert found.json()["error"]["type"] == "invalid_request_error"
    assert raw.get("/health").status_code == 200


def test_what_is_too_long_is_refused(client, raw):
    with pytest.raises(openai.BadRequestError, match="the context is 512"):
        said(client, messages=[{"role": "user", "content": "long " * 600}])
    assert raw.post("/v1/chat/completions", content=b" " * 200_001).status_code == 413
    assert raw.post("/v1/messages", content=b" " * 200_001).json()["type"] == "error"


def test_without_the_key_nothing_is_told(server):
    for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": ""}, {"authorization": KEY}):
        for path in ("/v1/models", "/metrics", "/tokenize", "/nothing"):
            assert httpx.get(f"{server}{path}", headers=headers).status_code == 401
    assert httpx.get(f"{server}/v1/models", headers={"x-api-key": KEY}).status_code == 200


def test_unknown_paths_and_models(client, raw):
    assert raw.get("/nothing").json()["error"]["type"] == "not_found_error"
    with pytest.raises(openai.NotFoundError, match="served are: tiny"):
        said(client, model="../../etc/passwd")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_command_of_the_page_by_curl(server):
    """As docs/serving.md has it, but for the address and the key."""
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
    command = re.search(r"^curl .*?\n```", page, re.MULTILINE | re.DOTALL)[0].removesuffix("```")
    command = command.replace("http://127.0.0.1:8080", server).replace("curl ", "curl -sS -H 'x-api-key: secret' ", 1)
    command = command.replace('"stream": true', '"stream": true, "max_tokens": 5')
    told = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True).stdout
    events = [line.removeprefix("data: ") for line in told.splitlines() if line]
    assert events[-1] == "[DONE]"
    found = [json.loads(event) for event in events[:-1]]
    assert "".join(choice["delta"].get("content") or "" for one in found for choice in one["choices"])
    assert found[-1]["choices"][0]["finish_reason"] in ("length", "stop")

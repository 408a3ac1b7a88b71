"""Embeddings: hidden states against transformers', and the server as OpenAI's client sees it."""

import base64
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
import torch
import uvicorn
from tiny_model import tiny_config, write_model

from quern.architectures.base import ARCHITECTURES
from quern.core.errors import UserError
from quern.engines.cpu import CpuEngine
from quern.engines.reference import load as load_reference
from quern.generation.speculation.opening import SpeculationOptions
from quern.serving.app import make_app
from quern.serving.embedding import pooling_named
from quern.serving.model import ServedModel
from quern.serving.models import Models
from quern.serving.scheduler import Limits
from quern.serving.server import Served, run

FLOAT32 = 2e-4
"""Sums of up to 96 float32 terms carry 96 x 2^-24 = 6e-6; about 30 of them follow each other in three blocks."""
IDS = torch.randint(0, 250, (2, 60), generator=torch.Generator().manual_seed(4))
TEXTS = ["one two three", "four", "a longer text about nothing in particular, " * 5]


def near(ours, theirs, bound=FLOAT32):
    return float((ours - theirs).abs().max() / theirs.abs().max()) < bound


@pytest.mark.parametrize("family", ARCHITECTURES.names())
def test_hidden_states_are_those_of_transformers(family, tmp_path):
    folder = write_model(tmp_path / "model", tiny_config(family, torch_dtype="float32"))
    reference, ours = load_reference(folder), CpuEngine().load(folder, cache="float32")
    with torch.inference_mode():
        expected = reference.model(IDS, output_hidden_states=True).hidden_states[-1]
    for model in (reference, ours):
        assert model.hidden_size == expected.shape[-1]
        first, second = model.open(), model.open()
        pieces = [model.hidden_states([(first, IDS[0, :25].tolist()), (second, IDS[1].tolist())])]
        pieces.append(model.hidden_states([(first, IDS[0, 25:].tolist())]))
        found = torch.cat([pieces[0][:25], pieces[1], pieces[0][25:]])
        assert found.dtype == torch.float32
        assert near(found, expected.flatten(0, 1))
        assert first.length == second.length == 60
        logits = model.step([(first, [3])])
        assert near(logits[0], reference.logits(torch.cat([IDS[:1], torch.tensor([[3]])], 1))[0, -1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny_config(torch_dtype="float32", max_position_embeddings=512)
    return write_model(tmp_path_factory.mktemp("embedding"), config)


@pytest.fixture(scope="module")
def server(folder):
    limits = Limits(parallel=3, waiting=8, prompt_tokens=32)
    models = {
        name: lambda name=name: ServedModel(folder, name, threads=1, cache="float32", limits=limits, pooling=name)
        for name in ("mean", "last")
    }
    listening = socket.create_server(("127.0.0.1", 0))
    serving = uvicorn.Server(uvicorn.Config(make_app(Models(models)), log_level="warning"))
    thread = threading.Thread(target=serving.run, args=([listening],), daemon=True)
    thread.start()
    while not serving.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    serving.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def expected(folder):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)

    def vector(text, pooling, dimensions=None):
        with torch.inference_mode():
            states = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        found = (states.mean(0) if pooling == "mean" else states[-1])[:dimensions]
        return (found / found.norm()).numpy()

    return vector


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("form", ["float", "base64", None])
def test_vectors_are_those_of_transformers(client, expected, pooling, form):
    options = {} if form is None else {"encoding_format": form}
    found = client.embeddings.create(model=pooling, input=TEXTS, **options)
    assert [one.index for one in found.data] == [0, 1, 2]
    for text, one in zip(TEXTS, found.data, strict=True):
        given = one.embedding
        vector = np.frombuffer(base64.b64decode(given), "<f4") if isinstance(given, str) else np.array(given)
        # Of a vector of length 1; the mean of states that differ may be shorter than they are, but not by ten times.
        assert np.abs(vector - expected(text, pooling)).max() < 10 * FLOAT32
        assert abs(np.linalg.norm(vector) - 1) < 1e-6
    assert found.usage.prompt_tokens == found.usage.total_tokens > 100


def test_token_ids_dimensions_and_single_texts(client, expected, server):
    ids = httpx.post(f"{server}/tokenize", json={"prompt": TEXTS[0]}).json()["tokens"]
    single = client.embeddings.create(model="mean", input=TEXTS[0]).data[0].embedding
    assert client.embeddings.create(model="mean", input=ids).data[0].embedding == single
    two = client.embeddings.create(model="mean", input=[ids, ids[:2]])
    assert [len(one.embedding) for one in two.data] == [64, 64]
    assert two.data[0].embedding == single
    cut = client.embeddings.create(model="mean", input=TEXTS[0], dimensions=10).data[0].embedding
    assert np.abs(np.array(cut) - expected(TEXTS[0], "mean", 10)).max() < 10 * FLOAT32


def test_embeddings_beside_answers_and_each_other(client, server):
    """Vectors do not depend on who else is there, and answers do not either."""
    asked = {"model": "mean", "prompt": "abc", "max_tokens": 60, "temperature": 0, "extra_body": {"ignore_eos": True}}
    answer = client.completions.create(**asked).choices[0].text
    texts = [text * count for count in (1, 2, 3) for text in TEXTS]
    lone = [client.embeddings.create(model="mean", input=text).data[0].embedding for text in texts]
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(client.completions.create, **asked) for _ in range(3)]
        found = list(pool.map(lambda text: client.embeddings.create(model="mean", input=text).data[0].embedding, texts))
    assert found == lone
    assert all(one.result().choices[0].text == answer for one in answers)


REFUSED = {
    "nothing": {},
    "an empty text": {"input": ""},
    "an empty list": {"input": []},
    "an empty text among others": {"input": ["a", ""]},
    "too long": {"input": "long " * 600},
    "too many": {"input": ["a"] * 2049},
    "an unknown token": {"input": [5, 300]},
    "a negative token": {"input": [-1]},
    "a number": {"input": 5},
    "an object": {"input": {"text": "a"}},
    "a form": {"input": "a", "encoding_format": "int8"},
    "dimensions": {"input": "a", "dimensions": 65},
    "no dimensions": {"input": "a", "dimensions": 0},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_the_form_of_the_protocol(server, name):
    found = httpx.post(f"{server}/v1/embeddings", json={"model": "mean", **REFUSED[name]}, timeout=60)
    assert found.status_code == 400, found.text
    assert found.json()["error"]["type"] == "invalid_request_error"
    assert httpx.post(f"{server}/v1/embeddings", json={"model": "other", "input": "a"}).status_code == 404


def test_a_client_that_goes_stops_the_reading(server):
    body = {"model": "last", "input": [[5] * 500] * 500}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server}/v1/embeddings", json=body, timeout=0.2)
    deadline = time.monotonic() + 30
    while 'quern_waiting{model="last"} 0.0' not in httpx.get(f"{server}/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    read = float(
        httpx.get(f"{server}/metrics").text.split('quern_prompt_tokens_total{model="last"} ')[1].split("\n")[0]
    )
    assert read < 250_000


def test_what_cannot_be_served_is_refused_at_once(folder):
    with pytest.raises(UserError, match="auto, mean, last"):
        ServedModel(folder, "tiny", pooling="cls")
    served = Served({"a": str(folder), "b": str(folder)}, speculation=SpeculationOptions(draft=str(folder)))
    with pytest.raises(UserError, match="for one model, and 2"):
        run(served, print, print)


def test_the_pooling_is_what_the_files_say(tmp_path):
    assert pooling_named("auto", tmp_path) == "mean"
    assert pooling_named("last", tmp_path) == "last"
    (tmp_path / "1_Pooling").mkdir()
    for said, pooling in (
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ):
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(said))
        assert pooling_named("auto", tmp_path) == pooling
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    with pytest.raises(UserError, match="--pooling|pooling"):
        pooling_named("auto", tmp_path)
    with pytest.raises(UserError, match="auto, mean, last"):
        pooling_named("cls", tmp_path)

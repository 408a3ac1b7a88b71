"""MODEL as a Hub id: huggingface_hub's real download code against a small server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from quern.checkpoint import hub
from quern.checkpoint.hub import is_hub_id

COMMIT = "a" * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(100),
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"a pickle",
    "modeling_evil.py": b"raise SystemExit",
    "consolidated.safetensors": b"the same again",
    "onnx/model.safetensors": b"another format",
}
USE = """
import sys
from pathlib import Path
from quern.checkpoint.hub import download
from quern.core.errors import UserError
from quern.core.progress import Silent
for repository in sys.argv[1:]:
    try:
        print(" ".join(sorted(path.name for path in download(repository, Silent()).iterdir())))
    except UserError as error:
        print(error)
"""


class Hub(BaseHTTPRequestHandler):
    """The few answers of the Hub's interface that a download needs."""

    asked: list[str] = []

    def log_message(self, *_):
        pass

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        Hub.asked.append(path)
        listing = [{"type": "file", "path": name, "size": len(data), "oid": oid(data)} for name, data in FILES.items()]
        if path.startswith("/api/models/org/gated"):
            self.answer(403, b"{}", X_Error_Code="GatedRepo")
        elif path.startswith("/api/models/org/broken"):
            self.answer(500, b"{}")
        elif path == "/api/models/org/good/revision/main":
            siblings = [{"rfilename": name} for name in FILES]
            self.answer(200, json.dumps({"id": "org/good", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith("/api/models/org/good/tree"):
            self.answer(200, json.dumps(listing).encode())
        elif path.startswith(f"/org/good/resolve/{COMMIT}/"):
            data = FILES[path.removeprefix(f"/org/good/resolve/{COMMIT}/")]
            self.answer(200, data, ETag=f'"{oid(data)}"', X_Repo_Commit=COMMIT)
        else:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")


def oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def endpoint():
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def use(home, endpoint: str, *repositories: str, **environment: str) -> list[str]:
    """What ``download`` gives for each repository, in a process of its own (the endpoint is read at import)."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **environment}
    result = subprocess.run(
        [sys.executable, "-c", USE, *repositories], env=env, capture_output=True, text=True, timeout=100, check=True
    )
    return result.stdout.splitlines()


def test_only_json_safetensors_and_tokenizer_files_are_downloaded(tmp_path, endpoint):
    (names,) = use(tmp_path, endpoint, "org/good")
    assert names == "chat_template.jinja config.json model.safetensors tokenizer.json"
    assert not [path for path in Hub.asked if path.endswith((".bin", ".py", "consolidated.safetensors"))]
    assert use(tmp_path, "http://127.0.0.1:9", "org/good", HF_HUB_OFFLINE="1") == [names]


def test_refusals_of_the_hub_say_what_to_do(tmp_path, endpoint):
    gated, missing, broken = use(tmp_path, endpoint, "org/gated", "org/missing", "org/broken")
    assert "org/gated is gated" in gated
    assert "hf auth login" in gated
    assert "'org/missing' is neither a local folder nor a model that the Hub shows you" in missing
    assert "getting it from the Hub failed" in broken
    assert "500" in broken


def test_without_a_network_the_message_says_so(tmp_path):
    (offline,) = use(tmp_path, "http://127.0.0.1:9", "org/good", HF_HUB_OFFLINE="1")
    assert "'org/good' is no local folder, and getting it from the Hub failed" in offline
    assert "Check the network" in offline


@pytest.mark.parametrize("text", ["Qwen/Qwen2.5-0.5B", "a/b", "HuggingFaceTB/SmolLM2-135M"])
def test_is_an_id(text):
    assert is_hub_id(text)


@pytest.mark.parametrize("text", ["", "model", "/a/b", "./a", "a/b/c", "../a", "a/..", "a b/c", "a/b\n", "~/a", "a/"])
def test_is_no_id(text):
    assert not is_hub_id(text)


def test_a_download_tells_what_has_come_where_there_is_no_terminal(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    blobs = tmp_path / "models--some--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "old").write_bytes(b"x" * 5_000_000)
    told, said = threading.Event(), []

    class Listener:
        def log(self, message):
            said.append(message)
            if len(said) > 2:
                told.set()

    def download(repository, **_):
        (blobs / "new.incomplete").write_bytes(b"x" * 3_000_000)
        assert told.wait(60)
        return str(tmp_path)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "TELL_S", 0.01)
    assert hub.download("some/model", Listener()) == tmp_path
    assert said[0] == "getting some/model from the Hugging Face Hub"
    assert said[-1] == "getting some/model: 3 MB have come"

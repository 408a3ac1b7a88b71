"""A server that answers as the Hub does, in the few ways that quern asks, and misbehaves where it is told to."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 40


class Hub:
    """The files of one model, ``org/model``. What is in ``broken`` ends after so many bytes, each time it is asked for;
    what is in ``wrong`` comes with other bytes; ``gone`` closes every connection."""

    def __init__(self, folder: Path) -> None:
        self.files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.asked: list[tuple[str, str | None]] = []
        """Every file that was sent, with the range that was asked for."""
        self.broken: dict[str, int] = {}
        self.wrong: set[str] = set()
        self.gone = False

    def sent(self) -> Counter[str]:
        """How often each file was asked for, headers of shards apart."""
        return Counter(name for name, part in self.asked if part is None or not part.startswith("bytes=0-"))

    def described(self) -> dict[str, Any]:
        """The model's files, those of tensors in LFS."""
        siblings = []
        for name, data in self.files.items():
            one: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
            if name.endswith(".safetensors"):
                one["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(one)
        return {"id": "org/model", "sha": COMMIT, "siblings": siblings}


def git_sha1(data: bytes) -> str:
    """What git calls a file of that content."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """Its address."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if hub.gone:
                self.connection.close()
            elif path == "/api/models/org/model":
                self.answer(200, json.dumps(hub.described()).encode())
            elif path.startswith(f"/org/model/resolve/{COMMIT}/"):
                self.file(path.rpartition("/")[2])
            else:
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def file(self, name: str) -> None:
            data, asked = hub.files[name], self.headers.get("Range")
            hub.asked.append((name, asked))
            if name in hub.wrong and asked is None:
                data = data[:-1] + bytes([data[-1] ^ 1])
            if asked is None:
                self.answer(200, data, {}, hub.broken.get(name))
                return
            first, last = asked.removeprefix("bytes=").split("-")
            begin, end = int(first), min(int(last) + 1, len(data)) if last else len(data)
            self.answer(206, data[begin:end], {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"},
                        hub.broken.get(name) if begin else None)  # fmt: skip

        def answer(
            self, status: int, body: bytes, headers: dict[str, str] | None = None, most: int | None = None
        ) -> None:
            self.send_response(status)
            for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body[:most])
            if most is not None:
                self.wfile.flush()
                self.connection.close()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()

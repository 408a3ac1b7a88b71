"""Requests that no client would send, drawn from a seed, and what a server may do with them.

    python tools/malformed_requests.py http://127.0.0.1:8080 [--count 500] [--seed 0] [--key KEY]

Bodies of every protocol with fields of other types, huge numbers, deep nesting and text that is none; heads with wrong
lengths, paths that climb, and bytes that are no HTTP. Each has to be answered with status 4xx in the form of its protocol,
or, where only some fields are odd, with 200; what is no HTTP may be answered by closing the connection. Exit code 1 where
one is answered otherwise, or where the server does not answer afterwards.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import random
import socket
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SHORT = {"temperature": 0, "seed": 1, "top_p": 0.9, "stream": False}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "", "messages": HELLO, "max_tokens": 2, "n": 1, "stop": ["x"], "logit_bias": {"1": 1}, "top_k": 3,
        "tools": [TOOL], "tool_choice": "none", "presence_penalty": 0.1, "chat_template_kwargs": {"a": 1},
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}, **SHORT,
    },
    "/v1/completions": {"prompt": "Hello", "max_tokens": 2, "logprobs": 1, "echo": True, "stop": "x", **SHORT},
    "/v1/responses": {"input": HELLO, "max_output_tokens": 2, "instructions": "Be short.", "tools": [], **SHORT},
    "/v1/messages": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}], "max_tokens": 2,
        "system": "Be short.", "stop_sequences": ["x"], "tools": [{"name": "f", "input_schema": {}}], **SHORT,
    },
    "/v1/messages/count_tokens": {"messages": HELLO, "system": [{"type": "text", "text": "x"}]},
    "/tokenize": {"prompt": "Hello", "add_special_tokens": True},
    "/detokenize": {"tokens": [1, 2]},
}  # fmt: skip
"""A body that is answered, by path."""
REQUIRED = {
    "/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/responses": "input", "/v1/messages": "messages",
    "/v1/messages/count_tokens": "messages", "/detokenize": "tokens",
}  # fmt: skip
DEEP = 3000
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "",
    "x", "\ud800", "\0", "0" * 5000, "\u202e", [], {}, [[]], [{}], {"": None}, {"\ud800": "\udfff"}, [None] * 300,
    ["a"] * 5000, [10**30], [-1], [2**31], {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
    "../../etc/passwd", {"type": "regex", "regex": "(a{999}){999}"}, {"type": "regex", "regex": "("},
    {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}, {"$ref": "file:///etc/passwd"},
    {"type": "function", "function": {"name": "nobody"}}, {"1": "\ud800"}, {str(n): "x" for n in range(3000)},
]  # fmt: skip
"""Values that a field may get."""


class Malformed(NamedTuple):
    """``raw`` are the bytes; ``path`` says which protocol an error has to have, none for what is no HTTP."""

    name: str
    raw: bytes
    path: str | None = None
    refused: bool = True
    """Whether it may not be answered with 200."""
    whole: bool = True
    """Whether the server can know that nothing more comes."""


def malformed_requests(seed: int, count: int, key: str | None = None) -> Iterator[Malformed]:
    """So many of them: the same seed, the same bytes."""
    draw = random.Random(seed)
    for _ in range(count):
        yield draw.choice((_odd_field, _odd_field, _odd_field, _no_body_of_it, _odd_head, _no_http))(draw, key)


def _request(
    path: str, body: bytes, key: str | None, head: str = "", length: object = None, method: str = "POST"
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close"]
    lines += [] if "content-type" in head.lower() else ["Content-Type: application/json"]
    lines += (
        [] if "transfer-encoding" in head.lower() else [f"Content-Length: {len(body) if length is None else length}"]
    )
    lines += [] if key is None else [f"Authorization: Bearer {key}"]
    return "\r\n".join([*lines, *([head] if head else []), "", ""]).encode("latin-1") + body


def _encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def _odd_field(draw: random.Random, key: str | None) -> Malformed:
    """One to three fields, anywhere in a body, get values that they do not have."""
    path = draw.choice(sorted(BODIES))
    body = json.loads(json.dumps(BODIES[path]))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        place: Any = body
        while True:
            inside = draw.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
            if isinstance(place[inside], (dict, list)) and place[inside] and draw.random() < 0.6:
                place = place[inside]
                continue
            place[inside] = copy.deepcopy(draw.choice(ODD))
            break
        if not body:
            break
    return Malformed("odd field", _request(path, _encoded(body), key), path, refused=False)


def _no_body_of_it(draw: random.Random, key: str | None) -> Malformed:
    """Bodies that are none of this protocol."""
    path = draw.choice(sorted(REQUIRED))
    good = _encoded(BODIES[path])
    lacking = _encoded({name: value for name, value in BODIES[path].items() if name != REQUIRED[path]})
    nested = b'{"a":' * DEEP + b"1" + b"}" * DEEP
    kinds: dict[str, bytes] = {
        "empty": b"", "no JSON": b"{", "cut": good[: draw.randrange(1, len(good) - 1)], "a list": b"[]", "a text": b'"x"',
        "null": b"null", "a number": b"1" * 9000, "lacking": lacking, "deep lists": b"[" * DEEP,
        "deep": good[:-1] + b', "x": ' + nested + b', "' + REQUIRED[path].encode() + b'": 0.5}',
        "no UTF-8": good.replace(b"Hello", b"\xff\xfe\xc3\x28").replace(b"1", b"\x80"), "zeros": bytes(500),
        "UTF-16": good.decode().encode("utf-16")[: draw.randrange(2, 40)], "noise": draw.randbytes(300),
        "two": good + good, "zipped": gzip.compress(good), "a comment": b"/* x */" + good, "only a comma": b",",
    }  # fmt: skip
    name = draw.choice(sorted(kinds))
    return Malformed(name, _request(path, kinds[name], key), path)


def _odd_head(draw: random.Random, key: str | None) -> Malformed:
    """Heads that say something else than what comes."""
    path = draw.choice(sorted(REQUIRED))
    good = _encoded(BODIES[path])
    climbing = draw.choice(
        ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2f%2e%2e", "//",
         "/v1/models/\\..\\..", "/v1/chat/completions/../../..", "/%00", "/%ff%fe", "/static/..%252f..%252fetc/passwd")
    )  # fmt: skip
    kinds = {
        "a climbing path": Malformed("", _request(climbing, b"", key, method="GET"), climbing),
        "another method": Malformed("", _request(path, good, key, method=draw.choice(("GET", "PUT"))), path),
        "an unknown method": Malformed("", _request(path, good, key, method="QUERNIFY"), path),
        "a short length": Malformed("", _request(path, good, key, length=len(good) // 2), path),
        "a long length": Malformed("", _request(path, good, key, length=len(good) + 9), path, whole=False),
        "a huge length": Malformed("", _request(path, good, key, length=10 ** draw.randrange(9, 40)), None),
        "a negative length": Malformed("", _request(path, good, key, length=-5), None),
        "no length": Malformed("", _request(path, good, key, length="many"), None),
        "two lengths": Malformed("", _request(path, good, key, head="Content-Length: 1"), None),
        "bad chunks": Malformed("", _request(path, b"zz\r\n" + good, key, head="Transfer-Encoding: chunked"), None),
        "half a chunk": Malformed("", _request(path, b"ff\r\n{", key, head="Transfer-Encoding: chunked"), path, whole=False),
        "another type": Malformed("", _request(path, good, key, head="Content-Type: text/xml; charset=x"), path),
        "a long head": Malformed("", _request(path, good, key, head="X: " + "y" * 200_000), None),
        "many heads": Malformed("", _request(path, good, key, head="\r\n".join(["X: y"] * 20_000)), None),
        "a long path": Malformed("", _request("/" + "x" * 60_000, b"", key, method="GET"), "/"),
        "no key": Malformed("", _request(path, good, "\x7f"), None, refused=key is not None),
    }  # fmt: skip
    name = draw.choice(sorted(kinds))
    found = kinds[name]
    return Malformed(name, found.raw, found.path, found.refused, found.whole)


def _no_http(draw: random.Random, key: str | None) -> Malformed:
    """Bytes of something else, or of half a request."""
    good = _request("/v1/completions", _encoded(BODIES["/v1/completions"]), key)
    kinds = {
        "noise": (draw.randbytes(200), False), "half a request": (good[: draw.randrange(1, len(good) - 1)], False),
        "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(100), False),
        "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", True), "no version": (b"GET /\r\n\r\n", True),
        "an older version": (good.replace(b"HTTP/1.1", b"HTTP/-1"), True), "nothing": (b"\r\n\r\n", False),
        "lines without end": (b"GET / HTTP/1.1\r\nX", False),
        "bare newlines": (b"GET /nothing HTTP/1.1\nHost: x\n\n", False),
        "a space in a name": (good.replace(b"Host:", b"Ho st:"), True),
    }  # fmt: skip
    name = draw.choice(sorted(kinds))
    raw, whole = kinds[name]
    return Malformed(name, raw, None, whole=whole)


def send(host: str, port: int, raw: bytes, patience: float) -> bytes:
    """All that a server answers until it closes the connection, or says nothing for ``patience`` seconds."""
    found = b""
    with socket.create_connection((host, port), timeout=patience) as connection:
        try:
            connection.sendall(raw)
            while piece := connection.recv(65536):
                found += piece
        except OSError:
            pass
    return found


def problem(sent: Malformed, answer: bytes) -> str | None:
    """What is wrong with an answer, or None."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head:
        return "no answer" if sent.path is not None and sent.whole else None
    status = int(head.split(b" ", 2)[1])
    if 200 <= status < 300:
        return f"status {status}" if sent.refused else None
    if not 400 <= status < 500:
        return f"status {status}: {body[:200]!r}"
    if sent.path is None:
        return None
    try:
        told = json.loads(body)
        right = isinstance(told["error"]["message"], str) and isinstance(told["error"]["type"], str)
        right = right and (told.get("type") == "error") == sent.path.startswith("/v1/messages")
    except (ValueError, KeyError, TypeError):
        right = False
    return None if right else f"status {status} in another form: {body[:200]!r}"


def main() -> int:
    """Send them, and tell what was answered wrongly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--key")
    options = parser.parse_args()
    parts = urlsplit(options.url)
    statuses: Counter[str] = Counter()
    problems = 0
    for sent in malformed_requests(options.seed, options.count, options.key):
        answer = send(parts.hostname or "127.0.0.1", parts.port or 80, sent.raw, 30 if sent.whole else 0.2)
        statuses[answer[9:12].decode("latin-1") or "none"] += 1
        if wrong := problem(sent, answer):
            problems += 1
            print(f"{sent.name}, {sent.path}: {wrong}\n    {sent.raw[:1500]!r}")
    with urllib.request.urlopen(f"{options.url}/health", timeout=30) as response:
        alive = response.status == 200
    print(f"{options.count} requests, {problems} answered wrongly; by status: {dict(statuses)}; alive: {alive}")
    return 1 if problems or not alive else 0


if __name__ == "__main__":
    sys.exit(main())

"""A tiny model that is served, by a server in a thread of the tests."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiny_model import tiny_config, write_model

TEMPLATE = (
    "{% for tool in tools or [] %}<tool_call> {{ tool.function.name }}\n{% endfor %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n"
    "{% for call in message.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Of a model that knows tools."""


def write_served_model(folder: Path, **changes: Any) -> Path:
    """One with a chat template and a context of 512 tokens."""
    write_model(folder, tiny_config(**{"max_position_embeddings": 512, **changes}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return folder


@contextmanager
def running(app: Any, send_buffer: int | None = None, **config: Any) -> Iterator[str]:
    """The URL of a server that runs ``app`` until the block ends; it has to have survived.

    ``send_buffer``: bytes that the system keeps of what a client has not read.
    """
    import uvicorn

    listening = socket.create_server(("127.0.0.1", 0), backlog=256)
    if send_buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    serving = uvicorn.Server(uvicorn.Config(app, log_level="critical", **config))
    thread = threading.Thread(target=serving.run, args=([listening],), daemon=True)
    thread.start()
    while not serving.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    assert thread.is_alive()
    serving.should_exit = True
    thread.join(30)
    assert not thread.is_alive()

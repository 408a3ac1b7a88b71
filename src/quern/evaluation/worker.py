"""What the process of one contender answers, whichever library loads its model.

A contender has a process to itself, so that its peak memory is its own and the timed rounds of several loaded
contenders can alternate. One request is one line of JSON on stdin, its answer one line on stdout; meanwhile lines
``{"advance": n}`` may come: steps done, and a sign that the process is alive. Whatever libraries print goes to
stderr. The end of stdin ends the process, also in the middle of a request.

Requests (``do`` names them) and what the answer holds beside ``"ok": true``:

- ``load``: ``path``, ``threads`` (or null) and what else the loader takes (``engine``, ``dtype`` and ``cache`` for quern's
  own engines) -> ``vocabulary_size``, ``maximum_length``, ``bytes_per_token``
- ``reference``: ``windows`` (file), ``cache`` (folder), ``key`` -> nothing; computes and stores reference logits
- ``measure``: ``name`` of a measure, ``threads`` (or null: as loaded) and what its run may use (fields of ``Given``:
  ``windows_file``, ``options_file``, ``cache``, ``key``, ``prompt``, ``decode_tokens``) -> ``raw``: what the run returns
- ``notes`` -> ``notes``: what the model did otherwise than it was asked to, so far
- ``quit`` -> nothing; the process ends

A process may answer more than these (``quern.peers.worker`` does).

A failed request is answered by ``"ok": false``, ``kind`` and ``error``: ``user`` (the request cannot be met, the text
is for a person), ``non_finite`` (the model's logits hold NaN or infinity) or ``internal`` (with a traceback on stderr).
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from quern.core.engine import LoadedModel, NotingModel
from quern.core.errors import QuernError
from quern.core.metrics import NonFiniteError
from quern.evaluation.accuracy import reference_logits
from quern.evaluation.energy import find_meter
from quern.evaluation.measures.base import MEASURES, Given
from quern.evaluation.reference_cache import ReferenceKey, ReferenceWriter
from quern.evaluation.texts import load_windows

Answer = dict[str, Any]
Loader = Callable[..., LoadedModel]


class Server:
    """Answers requests about one model, which ``loader`` loads; ``advance`` gets the steps of long ones as they are done.

    ``more`` are further verbs.
    """

    def __init__(
        self,
        loader: Loader,
        advance: Callable[[int], None] = lambda steps: None,
        more: Mapping[str, Callable[..., Answer]] = {},
    ) -> None:
        self._loader = loader
        self._advance = advance
        self._model: LoadedModel | None = None
        self._meter = find_meter()
        self._verbs: dict[str, Callable[..., Answer]] = {
            "load": self._load,
            "reference": self._reference,
            "measure": self._measure,
            "notes": self._notes,
            "quit": dict,
            **more,
        }

    def answer(self, request: dict[str, Any]) -> Answer:
        """Carry out one request; errors become answers."""
        arguments = {key: value for key, value in request.items() if key != "do"}
        try:
            return {"ok": True, **self._verbs[request["do"]](**arguments)}
        except NonFiniteError as error:
            return {"ok": False, "kind": "non_finite", "error": str(error)}
        except QuernError as error:
            return {"ok": False, "kind": "user", "error": error.message}
        except Exception as error:
            traceback.print_exc()
            return {"ok": False, "kind": "internal", "error": f"{type(error).__name__}: {error}"}

    @property
    def _loaded(self) -> LoadedModel:
        assert self._model is not None, "the first request must be load"
        return self._model

    def _load(self, path: str, threads: int | None, **options: Any) -> Answer:
        model = self._loader(path, threads=threads, **options)
        self._model = model
        return {
            "vocabulary_size": model.vocabulary_size,
            "maximum_length": model.maximum_length,
            "bytes_per_token": model.bytes_per_token(),
        }

    def _reference(self, windows: str, cache: str, key: dict[str, Any]) -> Answer:
        texts = load_windows(Path(windows))
        scored = sum(len(window.ids) - 1 for window in texts)
        size = self._loaded.vocabulary_size
        with ReferenceWriter(Path(cache), ReferenceKey.from_json(key), scored=scored, vocabulary_size=size) as writer:
            reference_logits(self._loaded, texts, writer.add, self._advance)
        return {}

    def _measure(self, name: str, threads: int | None = None, **given: Any) -> Answer:
        run = MEASURES.get(name).run
        assert run is not None, f"measure {name} is not run in the contender's process"
        if threads is not None:
            torch.set_num_threads(threads)
        return {"raw": run(self._loaded, Given(advance=self._advance, meter=self._meter, **given))}

    def _notes(self) -> Answer:
        model = self._loaded
        return {"notes": list(model.notes) if isinstance(model, NotingModel) else []}


def serve(loader: Loader, more: Mapping[str, Callable[..., Answer]] = {}) -> None:
    """Answer requests on stdin until ``quit`` or its end."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(requests,), daemon=True).start()
        server = Server(loader, lambda steps: _say(answers, {"advance": steps}), more)
        while True:
            request = requests.get()
            _say(answers, server.answer(request))
            if request["do"] == "quit":
                sys.stderr.flush()
                os._exit(0)  # ordinary shutdown would wait for the thread that reads stdin


def _say(answers: TextIO, data: Answer) -> None:
    answers.write(json.dumps(data) + "\n")
    answers.flush()


def _listen(requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    with os.fdopen(os.dup(sys.stdin.fileno()), encoding="utf-8") as lines:
        for line in lines:
            requests.put(json.loads(line))
    # The process that asked is gone: the rest of a long request is of no use, nor is what it may have started.
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)

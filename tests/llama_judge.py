"""Stock llama.cpp on GGUF files: ``python llama_judge.py QUERN BIN REQUEST.json``, run in llama.cpp's own environment.

``QUERN``: the folder of quern's package; ``BIN``: that of libllama. The request has ``files``, token numbers ``ids`` (sequences
of one length) and ``texts``. Beside each file comes ``NAME.json``: what llama.cpp makes of the texts, its greedy tokens after
the first sequence, and ``NAME.npy`` its logits float32 ``(sequences, time, vocabulary)``.
"""

from __future__ import annotations

import ctypes
import json
import sys
import types
from pathlib import Path
from typing import Any

GREEDY = 12


def main(quern: str, folder: str, request: str) -> None:
    package = types.ModuleType("quern")
    package.__path__ = [quern]
    sys.modules["quern"] = package
    import numpy as np
    import torch

    from quern.peers.llama_library import LlamaModel, load_library

    api = load_library(Path(folder))
    asked = json.loads(Path(request).read_text("utf-8"))
    ids = torch.tensor(asked["ids"])
    for file in asked["files"]:
        model = LlamaModel(Path(folder), Path(file), 1, 1)
        np.save(f"{file}.npy", model.logits(ids).numpy())
        session, tokens = model.start(), []
        logits = session.feed(ids[0].tolist())
        for _ in range(GREEDY):
            tokens.append(int(logits.argmax()))
            logits = session.feed(tokens[-1:])
        vocabulary = api.llama_model_get_vocab(model._model)
        said = {"texts": [tokenized(api, vocabulary, text) for text in asked["texts"]], "greedy": tokens}
        Path(f"{file}.json").write_text(json.dumps(said), "utf-8")


def tokenized(api: Any, vocabulary: Any, text: str) -> list[int]:
    """Token numbers of a text, with what is put around it."""
    raw = text.encode()
    room = len(raw) + 16
    tokens = (ctypes.c_int32 * room)()
    count = api.llama_tokenize(vocabulary, raw, len(raw), tokens, room, True, True)
    return list(tokens[:count])


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A model whose next-token logits depend on the last token only, a tokenizer of one token a character, and an engine
that loads such models from real folders. As a script: a measuring worker that knows this engine."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from quern.checkpoint.safetensors_file import write_safetensors
from quern.engines.base import ENGINES, Engine

VOCABULARY = 40
CONTEXT = 64
TABLE = "model.layers.0.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


class FakeTokenizer:
    """Letters, digits and space; the beginning-of-sequence token is 0, the end-of-sequence token 1."""

    letters = "abcdefghijklmnopqrstuvwxyz0123456789 ="

    def __init__(self, adds_bos: bool = True, bos: int | None = 0, eos: int | None = 1) -> None:
        self.bos_token_id = bos
        self.eos_token_id = eos
        self._adds_bos = adds_bos

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool = True) -> list[int]:
        front = [self.bos_token_id] if add_special_tokens and self._adds_bos else []
        return front + [2 + self.letters.index(c) for c in text.lower() if c in self.letters]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(self.letters[token - 2] if 2 <= token < 40 else "?" for token in token_ids)


class FakeSession:
    def __init__(self, model: FakeModel) -> None:
        self._model = model

    def feed(self, ids: list[int]) -> torch.Tensor:
        return self._model.logits(torch.tensor([ids]))[0, -1]


class FakeModel:
    """``logits[t] = table[ids[t]]``."""

    def __init__(self, table: torch.Tensor, maximum_length: int = CONTEXT) -> None:
        self.table = table.float()
        self.vocabulary_size = len(table)
        self.maximum_length = maximum_length
        self.batches: list[tuple[int, ...]] = []

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        self.batches.append(tuple(ids.shape))
        return self.table[ids]

    def start(self) -> FakeSession:
        return FakeSession(self)

    def bytes_per_token(self) -> int:
        return 2 * self.table.numel()


def bigram_table(seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    values = np.random.default_rng(seed).normal(scale=scale, size=(VOCABULARY, VOCABULARY))
    return torch.from_numpy(values.astype(np.float32))


def write_model(folder: Path, table: torch.Tensor, *, behaviour: str = "", quantized: dict | None = None) -> Path:
    """A folder that the fake engine loads. ``behaviour`` makes its loading or running go wrong."""
    folder.mkdir(parents=True)
    config = {"model_type": "fake", "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "dtype": "bfloat16"}
    if quantized is not None:
        config["quantization_config"] = quantized
    (folder / "config.json").write_text(json.dumps({**config, "behaviour": behaviour}))
    tensors = {TABLE: table.to(torch.bfloat16), EMBEDDING: torch.zeros(VOCABULARY, 4, dtype=torch.bfloat16)}
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


class FakeEngine(Engine):
    def obstacle(self, format: object, modules: object) -> str | None:
        return None

    def load(self, path: str | Path, *, dtype: str = "auto", threads: int | None = None) -> FakeModel:
        from quern.checkpoint.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(path)
        behaviour = checkpoint.config["behaviour"]
        print("a library prints to stdout")
        table = checkpoint.read(TABLE).float()
        if behaviour == "die":
            print("about to die", file=sys.stderr, flush=True)
            os.kill(os.getpid(), 9)
        if behaviour == "hang":
            time.sleep(60)
        if behaviour == "garbage":
            os.write(FakeEngine.answers, b"what is this\n")
        if behaviour == "bug":
            raise ZeroDivisionError("a bug in the engine")
        if behaviour == "nan":
            table[5, 7] = float("nan")
        # bfloat16 arithmetic differs from float32 by a rounding of the logits.
        return FakeModel(table if dtype == "float32" else (table * 1.01).bfloat16())


if __name__ == "__main__":
    from quern.comparison import worker

    FakeEngine.answers = os.dup(1)
    ENGINES.add("fake")(FakeEngine)
    worker.main()

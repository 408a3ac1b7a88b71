"""Random mutations of good headers: the readers either read or refuse, and nothing else ever happens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_files import corpus
from safetensors.torch import save

from quern.checkpoint.checkpoint import open_checkpoint
from quern.checkpoint.safetensors_file import read_header, read_tensor
from quern.core.errors import UserError
from quern.loading.fitting import open_model

ROUNDS = 3000
NUMBERS = [b"0", b"-1", b"1", b"255", b"4294967296", b"9223372036854775807", b"9223372036854775808", b"1e9", b"1e999"]
PIECES = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"null",
    b"true",
    b"NaN",
    b'"\\ud800"',
    b"\x00",
    b"\xff",
    b"F64",
    *NUMBERS,
]
WORDS = [0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


def mutated(random: np.random.Generator, raw: bytes, header_end: int) -> bytes:
    """``raw`` with one to four changes before ``header_end``: bits, bytes, pieces of JSON, numbers, cuts."""
    data = bytearray(raw)
    for _ in range(random.integers(1, 5)):
        at = int(random.integers(0, min(header_end, len(data) - 8)))
        kind = random.integers(6)
        if kind == 0:
            data[at] ^= 1 << int(random.integers(8))
        elif kind == 1:
            data[at] = int(random.integers(256))
        elif kind == 2:
            piece = PIECES[random.integers(len(PIECES))]
            data[at : at + int(random.integers(0, 3)) * len(piece)] = piece
        elif kind == 3:
            word = WORDS[random.integers(len(WORDS))]
            data[at : at + 8] = word.to_bytes(8, "little")
        elif kind == 4:
            del data[at : at + int(random.integers(1, 20))]
        else:
            end = at + int(random.integers(1, 40))
            data[at:at] = data[at:end]
    return bytes(data)


def small_safetensors() -> bytes:
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.tensor([True, False]),
        "c": torch.ones(4, dtype=torch.bfloat16),
    }
    return save(tensors, {"format": "pt"})


def with_its_length(raw: bytes, header_size: int) -> bytes:
    """The mutated header with a length that fits it, so that the mutation is what the JSON parser meets."""
    header = raw[8 : 8 + header_size]
    return len(header).to_bytes(8, "little") + raw[8:]


@pytest.mark.parametrize("keep_length", [True, False])
def test_safetensors(tmp_path, keep_length):
    random = np.random.default_rng(20261122)
    good = small_safetensors()
    header_end = 8 + int.from_bytes(good[:8], "little")
    path = tmp_path / "fuzz.safetensors"
    outcomes = {"read": 0, "refused": 0}
    for _ in range(ROUNDS // 2):
        raw = mutated(random, good, header_end)
        if keep_length:
            raw = with_its_length(good[:8] + raw[8:], header_end - 8 + len(raw) - len(good))
        path.write_bytes(raw)
        try:
            for info in read_header(path).values():
                tensor = read_tensor(path, info)
                assert tuple(tensor.shape) == info.shape
            outcomes["read"] += 1
        except UserError as error:
            outcomes["refused"] += "fuzz.safetensors" in str(error)
            str(error).encode()
    assert sum(outcomes.values()) == ROUNDS // 2
    # A fuzzer that only ever reads, or only ever refuses, tests nothing.
    assert min(outcomes.values()) > 0, outcomes


def use_gguf(path: Path) -> None:
    checkpoint = open_model(path)
    for name in checkpoint.names():
        checkpoint.read(name, finite=True)


def test_gguf(tmp_path):
    random = np.random.default_rng(20261123)
    config = {**corpus.CONFIG, "num_hidden_layers": 1}
    names = corpus.expected_shapes(config)
    tensors = {name: tensor for name, tensor in corpus.weights().items() if name in names}
    path = corpus.write_gguf(tmp_path / "fuzz.gguf", tensors, config)
    good = path.read_bytes()
    header_end = good.index(b"output_norm.weight") + 100
    outcomes = {"read": 0, "refused": 0}
    for _ in range(ROUNDS):
        path.write_bytes(mutated(random, good, header_end))
        try:
            use_gguf(path)
            outcomes["read"] += 1
        except UserError as error:
            str(error).encode()
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0, outcomes


def test_config_and_index(tmp_path):
    random = np.random.default_rng(20261124)
    model = corpus.sharded_folder(tmp_path / "model")
    outcomes = {"read": 0, "refused": 0}
    for name in ("config.json", corpus.INDEX):
        good = (model / name).read_bytes()
        assert json.loads(good)
        for _ in range(ROUNDS // 10):
            (model / name).write_bytes(mutated(random, good, len(good)))
            try:
                open_checkpoint(model)
                outcomes["read"] += 1
            except UserError as error:
                str(error).encode()
                outcomes["refused"] += 1
        (model / name).write_bytes(good)
    assert min(outcomes.values()) > 0, outcomes

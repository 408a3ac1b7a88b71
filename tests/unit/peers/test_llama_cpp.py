"""What llama.cpp's adapter decides without llama.cpp: pre-tokenizers, and how the library is compiled."""

import json
from pathlib import Path

import pytest

from quern.peers.adapters import llama_cpp
from quern.peers.llama_convert import QWEN2, pre_tokenizer_of

BUNDLED = Path(__file__).parents[3] / "models" / "python-7m" / "tokenizer.json"
BYTES = {"type": "ByteLevel", "use_regex": True}


def split(pattern):
    steps = [{"type": "Split", "pattern": {"Regex": pattern}}, {"type": "ByteLevel", "use_regex": False}]
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


@pytest.mark.parametrize(
    ("tokenizer", "name"),
    [
        (split(QWEN2), "qwen2"),
        (split(QWEN2 + "?"), "default"),
        ({"pre_tokenizer": BYTES}, "gpt-2"),
        ({"pre_tokenizer": {**BYTES, "use_regex": False}}, "default"),
        ({"pre_tokenizer": {"pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}}, "smollm"),
        ({"pre_tokenizer": {"pretokenizers": [{"type": "Digits", "individual_digits": False}, BYTES]}}, "default"),
        ({"pre_tokenizer": None}, "default"),
        ({}, "default"),
    ],
)
def test_pre_tokenizers_are_recognized_by_their_description(tokenizer, name):
    assert pre_tokenizer_of(tokenizer) == name


def test_the_bundled_model_splits_text_like_qwen2():
    assert pre_tokenizer_of(json.loads(BUNDLED.read_text("utf-8"))) == "qwen2"


@pytest.mark.parametrize("amx", [True, False])
def test_dead_store_elimination_is_off_only_where_amx_is_compiled(monkeypatch, amx):
    monkeypatch.setattr(llama_cpp, "_has_amx", lambda: amx)
    assert any("-fno-dse" in option for option in llama_cpp._options()) == amx

"""The tokenizer of a checkpoint: loaded, fitted, copied."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import gguf
import pytest
from bad_files import corpus
from tiny_model import calibration_text, write_tokenizer

from quern.checkpoint.tokenizer import copy_tokenizer, load_tokenizer, tokenizer_files, usable_tokenizer
from quern.core.errors import BadFileError, UserError


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_loads(tmp_path):
    tokenizer = load_tokenizer(corpus.good_folder(tmp_path / "model"))
    assert tokenizer("A~ ").input_ids == [33, 94, 0]


def test_a_model_without_one_needs_none_unless_text_is_read(tmp_path):
    assert usable_tokenizer(tmp_path, needed=False) is None
    with pytest.raises(UserError, match="has no tokenizer"):
        usable_tokenizer(tmp_path, needed=True)
    model = corpus.good_folder(tmp_path / "model")
    (model / "tokenizer.json").write_text("{{")
    for needed in (False, True):
        with pytest.raises(UserError, match="not JSON"):
            usable_tokenizer(model, needed)


def packed(folder: Path) -> Path:
    """A folder whose tokenizer is a SentencePiece model only, as Llama 2's first ones were."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    folder.mkdir()
    trainer.train(
        sentence_iterator=iter(calibration_text()[:20_000].splitlines()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    (folder / "tokenizer.vocab").unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": False}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


TEXT = "def add(a, b):\n    return a + b  # Grüße"


def test_a_sentencepiece_model_is_read_and_its_copy_needs_no_other_package(tmp_path, monkeypatch):
    source = packed(tmp_path / "model")
    ids = load_tokenizer(source).encode(TEXT, add_special_tokens=False)
    (tmp_path / "copy").mkdir()
    copies = copy_tokenizer(source, tmp_path / "copy")
    assert {copy.name for copy in copies} == {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
    assert (tmp_path / "copy" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    (tmp_path / "copy" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    hide(monkeypatch, "sentencepiece", "google.protobuf")
    assert load_tokenizer(tmp_path / "copy").encode(TEXT, add_special_tokens=False) == ids


def hide(monkeypatch, *modules):
    """The modules, as if they were not installed."""
    find = importlib.util.find_spec

    def without(name, *rest):
        if any(name == module or name.startswith(f"{module}.") for module in modules):
            raise ModuleNotFoundError(name)
        return find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)


@pytest.mark.parametrize(
    ("first", "hidden", "advice"),
    [
        (
            b"\n\x0e",
            ["sentencepiece"],
            "SentencePiece model, .*needs sentencepiece and protobuf.*pip install sentencepiece",
        ),
        (b"\n\x0e", ["sentencepiece", "google"], "pip install sentencepiece protobuf; or put"),
        (b"\n\x0e", ["google.protobuf"], "pip install"),
        (b"IQ== 0\n", ["tiktoken"], "a tiktoken vocabulary, .*pip install tiktoken;"),
    ],
)
def test_what_is_not_installed_is_named_by_what_the_file_is(tmp_path, monkeypatch, first, hidden, advice):
    hide(monkeypatch, *hidden)
    (tmp_path / "tokenizer.model").write_bytes(first + bytes(20))
    with pytest.raises(UserError, match=advice):
        usable_tokenizer(tmp_path, needed=False)


def test_a_damaged_sentencepiece_model_names_its_own_packages(tmp_path):
    for package in ("sentencepiece", "google.protobuf"):
        pytest.importorskip(package)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\xff\xff")
    with pytest.raises(UserError, match=r"tokenizer.model is damaged, or .*: sentencepiece \d\S+, protobuf \d"):
        load_tokenizer(tmp_path)


def test_a_folder_without_one_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match=f"{path} has no tokenizer"):
            load_tokenizer(path)


def test_copies_its_files_byte_by_byte_and_nothing_else(tmp_path):
    source = corpus.good_folder(tmp_path / "model")
    (source / "generation_config.json").write_text('{"do_sample": false}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "README.md").write_text("no")
    (source / "tokenization_evil.py").write_text("no")
    copies = copy_tokenizer(source, tmp_path / "copy")
    names = {"chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in copies} == names == {path.name for path in tokenizer_files(source)}
    assert hashes(tmp_path / "copy") == {name: digest for name, digest in hashes(source).items() if name in names}


def byte_level(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_pre("smollm")


def test_a_ggufs_tokenizer_is_saved_and_loads_again_with_the_same_bytes_every_time(tmp_path):
    path = corpus.write_gguf(tmp_path / "model.gguf", corpus.weights(), corpus.CONFIG, extra=byte_level)
    tokenizer = load_tokenizer(path)
    ids = tokenizer("$ABCAB").input_ids
    assert ids == [3, 95, 94]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        copies = copy_tokenizer(path, tmp_path / name)
        assert {copy.name for copy in copies} >= {"tokenizer.json", "tokenizer_config.json"}
        assert load_tokenizer(tmp_path / name)("$ABCAB").input_ids == ids
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_a_malformed_gguf_is_refused_before_the_library_sees_it(tmp_path):
    path = corpus.good_gguf(tmp_path / "model.gguf")
    raw = bytearray(path.read_bytes())
    raw[8:16] = b"\xff" * 8
    path.write_bytes(raw)
    with pytest.raises(UserError, match="tensors, more than the cap"):
        load_tokenizer(path)


def test_a_panic_of_the_tokenizers_library_is_a_damaged_file(tmp_path):
    """A prefix longer than a merge's second part makes it cut beyond the end of a string."""
    model = corpus.good_folder(tmp_path / "model")
    write_tokenizer(model)
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["continuing_subword_prefix"] = "#" * 18
    assert content["model"]["merges"]
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(BadFileError, match="its tokenizer cannot be loaded: .*out of range"):
        load_tokenizer(model)

"""The tokenizer of a checkpoint: loaded, fitted, copied."""

from __future__ import annotations

import hashlib
from pathlib import Path

import gguf
import pytest
from bad_files import corpus

from quern.checkpoint.tokenizer import check_tokenizer, copy_tokenizer, load_tokenizer, tokenizer_files
from quern.core.errors import UserError


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_loads_and_fits(tmp_path):
    tokenizer = load_tokenizer(corpus.good_folder(tmp_path / "model"))
    assert tokenizer("A~ ").input_ids == [33, 94, 0]
    check_tokenizer(tokenizer, corpus.VOCABULARY)
    check_tokenizer(tokenizer, corpus.VOCABULARY + 100)


def test_one_row_too_few_is_named(tmp_path):
    tokenizer = load_tokenizer(corpus.good_folder(tmp_path / "model"))
    with pytest.raises(
        UserError, match=r"embedding of 95 rows: 1 of 96 tokens have no row, for instance '\\x7f', id 95"
    ):
        check_tokenizer(tokenizer, corpus.VOCABULARY - 1)


def test_added_tokens_count_too(tmp_path):
    tokenizer = load_tokenizer(corpus.good_folder(tmp_path / "model"))
    tokenizer.add_tokens(["<extra>"])
    with pytest.raises(UserError, match=r"'<extra>', id 96"):
        check_tokenizer(tokenizer, corpus.VOCABULARY)


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

"""A tokenizer as quern-run reads it: tables of numbers, made of the ``tokenizers`` library's own description.

csrc/run/tokenizer.h reads them. What that cannot do is refused by its name, and the file then says so.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

NONE = 0xFFFFFFFF
LOW_LINE = "\u2581"
"""What SentencePiece's vocabularies have for a space."""
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_MODERN = _CONTRACTIONS + (r"|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2, ONE_DIGIT, THREE_DIGITS, EACH_DIGIT, DIGITS = range(1, 6)
"""Ways to cut words; csrc/run/words.h."""
CUTS = {
    _GPT2: GPT2,
    _MODERN.replace("DIGITS", r"\p{N}"): ONE_DIGIT,
    _MODERN.replace("DIGITS", r"\p{N}{1,3}"): THREE_DIGITS,
}


class UnknownTokenizerError(Exception):
    """It does something that quern-run cannot; the text says what."""


def no_tokenizer(reason: str, ends: Iterable[int]) -> bytes:
    """Tables of a model without a tokenizer, which is fed token numbers."""
    return struct.pack("<I", 0) + _text(reason) + _numbers(sorted(ends))


def tokenizer_tables(tokenizer: Any, first: Sequence[int], ends: Iterable[int]) -> bytes:
    """Tables of a transformers ``tokenizer``; ``first``: tokens in front of every text, ``ends``: those that end one.

    Raises ``UnknownTokenizerError``.
    """
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    model = said["model"]
    if model.get("type") != "BPE":
        raise UnknownTokenizerError(f"its model is {model.get('type')}, not BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise UnknownTokenizerError(f"its BPE has a {key}")
    before = said.get("pre_tokenizer")
    by_bytes = before is not None and "ByteLevel" in {stage["type"] for stage in _stages(before, "pretokenizers")}
    vocabulary: dict[str, int] = model["vocab"]
    head = _byte_level(said) if by_bytes else _characters(said)
    unknown = NONE if model.get("unk_token") is None or by_bytes else vocabulary[model["unk_token"]]
    flags = head["flags"] | (2 if model.get("ignore_merges") else 0)
    flags |= 0 if by_bytes else (4 if model.get("byte_fallback") else 0) | (8 if model.get("fuse_unk") else 0)
    added = said["added_tokens"]
    return b"".join(
        [
            struct.pack("<I", 1 if by_bytes else 2),
            _text(""),
            _numbers(sorted(ends)),
            struct.pack("<III", flags, head["prepend"], unknown),
            _numbers(head["stages"]),
            _numbers(first),
            _numbers(sorted(token["id"] for token in added if token["special"])),
            _added(added, head["late"]),
            _vocabulary(vocabulary, added, by_bytes),
            _bytes(vocabulary, by_bytes, bool(model.get("byte_fallback"))),
            _merges(model["merges"], vocabulary),
        ]
    )


def _byte_level(said: dict[str, Any]) -> dict[str, Any]:
    """Flags, ways to cut words, and whether added tokens may be looked for late."""
    normalizer = said.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise UnknownTokenizerError(f"it changes texts by {normalizer['type']}, and only NFC is known")
    if (decoder := said.get("decoder")) is None or decoder["type"] != "ByteLevel":
        raise UnknownTokenizerError(f"it reads bytes and is decoded by {None if decoder is None else decoder['type']}")
    *stages, last = _stages(said["pre_tokenizer"], "pretokenizers")
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        raise UnknownTokenizerError("its words do not become bytes last, or get a space in front")
    cuts = [_cut(stage) for stage in stages] + ([GPT2] if last.get("use_regex", True) else [])
    return {"flags": 0 if normalizer is None else 1, "prepend": 0, "stages": cuts, "late": normalizer is None}


def _cut(stage: dict[str, Any]) -> int:
    if stage["type"] == "Digits":
        return EACH_DIGIT if stage["individual_digits"] else DIGITS
    if stage["type"] != "Split" or stage["behavior"] != "Isolated" or stage["invert"]:
        raise UnknownTokenizerError(f"it cuts words by {stage['type']}")
    pattern = stage["pattern"].get("Regex")
    if pattern not in CUTS:
        raise UnknownTokenizerError(f"it cuts words by {json.dumps(pattern)}")
    return CUTS[pattern]


def _characters(said: dict[str, Any]) -> dict[str, Any]:
    """The same of a vocabulary like SentencePiece's, whose words are characters."""
    normalizers = _stages(said.get("normalizer"), "normalizers")
    before, found = said.get("pre_tokenizer"), {"flags": 0, "prepend": 0, "stages": [], "late": False}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": LOW_LINE}
    if before is not None:
        if before["type"] != "Metaspace" or before["replacement"] != LOW_LINE or normalizers:
            raise UnknownTokenizerError(f"it cuts words by {before['type']}")
        found["flags"] = 16 if before.get("split", True) else 0
        found["prepend"] = {"never": 0, "always": 2, "first": 3}[before.get("prepend_scheme", "always")]
    elif normalizers == [{"type": "Prepend", "prepend": LOW_LINE}, spaces]:
        found["prepend"] = 1
    elif normalizers != [spaces]:
        raise UnknownTokenizerError(
            f"it changes texts by {', '.join(_described(each) for each in normalizers) or 'nothing'}"
        )
    return found


def _described(normalizer: dict[str, Any]) -> str:
    pattern = normalizer.get("pattern")
    return normalizer["type"] if pattern is None else f"{normalizer['type']} of {json.dumps(pattern)}"


def _stages(said: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """One stage, or those of a sequence, whose parts are called ``name``."""
    if said is None:
        return []
    return list(said[name]) if said["type"] == "Sequence" else [said]


def _added(added: list[dict[str, Any]], late: bool) -> bytes:
    made = [struct.pack("<I", len(added))]
    for token in added:
        for habit in ("single_word", "lstrip", "rstrip"):
            if token[habit]:
                raise UnknownTokenizerError(f"its token {token['content']!r} has the habit {habit}")
        if token["normalized"] and not late:
            raise UnknownTokenizerError(f"its token {token['content']!r} is looked for in changed text")
        made += [struct.pack("<II", token["id"], token["normalized"]), _text(token["content"])]
    return b"".join(made)


def _vocabulary(vocabulary: dict[str, int], added: list[dict[str, Any]], by_bytes: bool) -> bytes:
    """What each token is: its bytes, or its name in a vocabulary of characters; and the tokens of words in order of that."""
    called = _of_bytes if by_bytes else str.encode
    texts = [b""] * (1 + max([*vocabulary.values(), *(token["id"] for token in added)], default=-1))
    for token in added:
        texts[token["id"]] = called(token["content"])
    for name, number in vocabulary.items():
        texts[number] = called(name)
    begins = list(accumulate(map(len, texts), initial=0))
    return b"".join(
        [
            struct.pack("<I", len(texts)),
            _plain(begins),
            *texts,
            _numbers(sorted(vocabulary.values(), key=texts.__getitem__)),
        ]
    )


def _of_bytes(name: str) -> bytes:
    """What a token of a byte-level vocabulary stands for; text that is no such token stands for itself."""
    if all(character in BYTES for character in name):
        return bytes(BYTES[character] for character in name)
    return name.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: those that can be seen stand for themselves, the others for what follows U+00FF."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(unseen)}


BYTES = _byte_alphabet()


def _bytes(vocabulary: dict[str, int], by_bytes: bool, falls_back: bool) -> bytes:
    letters = {byte: letter for letter, byte in BYTES.items()} if by_bytes else {b: f"<0x{b:02X}>" for b in range(256)}
    found = [vocabulary.get(letters[byte], NONE) for byte in range(256)]
    if by_bytes or falls_back:
        for byte in (*range(0xC0), *range(0xC2, 0xF5)):  # the others are in no text
            if found[byte] == NONE:
                raise UnknownTokenizerError(f"it has no token for the byte {byte:#04x}")
    return _plain(found)


def _merges(merges: list[Any], vocabulary: dict[str, int]) -> bytes:
    rows: dict[tuple[int, int], tuple[int, int]] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rows[vocabulary[left], vocabulary[right]] = rank, vocabulary[left + right]
    return struct.pack("<I", len(rows)) + _plain(number for pair in sorted(rows) for number in (*pair, *rows[pair]))


def _text(text: str) -> bytes:
    return struct.pack("<I", len(text.encode())) + text.encode()


def _numbers(numbers: Iterable[int]) -> bytes:
    listed = list(numbers)
    return struct.pack("<I", len(listed)) + _plain(listed)


def _plain(numbers: Iterable[int]) -> bytes:
    listed = list(numbers)
    return struct.pack(f"<{len(listed)}I", *listed)

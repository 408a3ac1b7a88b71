"""A checkpoint's tokenizer as the metadata that llama.cpp reads: the inverse of ``gguf/tokenizer.py``.

Two kinds are written: byte-level BPE, whose rule for cutting text is named (``gguf/pre_tokenizers.py``), and SentencePiece's
BPE, whose merges become scores. What quern reads back is held against the checkpoint's own tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quern.checkpoint.files import read_json
from quern.checkpoint.gguf import pre_tokenizers
from quern.checkpoint.gguf.header import GgufArray, read_gguf_header
from quern.checkpoint.gguf.split import first_part
from quern.checkpoint.gguf.tokenizer import (
    ARRAYS,
    BYTE,
    CONTROL,
    NORMAL,
    PREFIX,
    SPACE,
    SPECIAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    merges_of_scores,
    tokenizer_of,
)
from quern.checkpoint.tokenizer import load_tokenizer, tokenizer_sources
from quern.core.errors import BadFileError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE = "tokenizer.chat_template"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_JSON_LIMIT = 256 * 1024 * 1024


@dataclass
class Vocabulary:
    """What a GGUF says of the tokenizer."""

    values: dict[str, Any]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Tokens:
    texts: list[str]
    kinds: list[int]


def vocabulary(path: Path, size: int, ends: Sequence[int], pre_tokenizer: str | None = None) -> Vocabulary:
    """The tokenizer of the checkpoint ``path`` (a folder or GGUF file) for an embedding of ``size`` rows.

    ``ends``: token numbers that end an answer, besides the tokenizer's own end of a text. ``pre_tokenizer``: llama.cpp's
    name of the rule that cuts text, where it is not to be found out. Raises ``UserError`` for tokenizers that llama.cpp has
    not.
    """
    if path.is_file():
        return Vocabulary(_copied(path))
    if not tokenizer_sources(path):
        return Vocabulary(
            {PREFIX + "model": "none"},
            ["the checkpoint has no tokenizer, so the file has none: token numbers in and out"],
        )
    tokenizer = load_tokenizer(path)
    described = _described(path, tokenizer)
    model = described["model"]
    if model.get("type") != "BPE":
        raise UserError(
            f"{path} has a tokenizer of the kind {model.get('type')!r}; those that are written to a GGUF are byte-level BPE "
            "and SentencePiece's BPE"
        )
    tokens = _tokens(path, described, size)
    made = Vocabulary({})
    if model.get("byte_fallback"):
        _add_sentence_piece(made, path, described, tokens)
    else:
        _add_byte_level(made, path, described, tokens, tokenizer, pre_tokenizer)
    _add_special(made.values, tokenizer, tokens, ends)
    _add_templates(made.values, tokenizer)
    _compare(made, path, tokenizer)
    return made


def _copied(path: Path) -> dict[str, Any]:
    """The tokenizer of another GGUF file, word for word; arrays that say nothing of these two kinds are left out."""
    metadata = read_gguf_header(first_part(path), ARRAYS).metadata
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in metadata.items()
        if key.startswith("tokenizer.") and not isinstance(value, GgufArray)
    }


def _described(path: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """tokenizer.json, or what it would be."""
    file = path / "tokenizer.json"
    described = read_json(file, _JSON_LIMIT) if file.is_file() else json.loads(tokenizer.backend_tokenizer.to_str())
    if not isinstance(described.get("model"), dict):
        raise BadFileError(file, "describes no model", "Get the model's tokenizer.json again")
    return dict(described)


def _tokens(path: Path, described: Mapping[str, Any], size: int) -> _Tokens:
    """Texts and kinds of all rows of the embedding; those that no token has are ``[PADi]``."""
    model, added = described["model"], described.get("added_tokens") or []
    words = {int(number): str(text) for text, number in model["vocab"].items()}
    special = {int(entry["id"]): entry for entry in added}
    greatest = max([*words, *special], default=-1)
    if greatest >= size:
        raise BadFileError(
            path, f"its tokenizer has a token number {greatest}, its embedding {size} rows", "Get the checkpoint again"
        )
    unknown, bytes_ = model.get("unk_token"), bool(model.get("byte_fallback"))
    texts, kinds = [], []
    for number in range(size):
        entry = special.get(number)
        text = str(entry["content"]) if entry else words.get(number, f"[PAD{number}]")
        if bytes_ and text == unknown:
            kind = UNKNOWN
        elif entry:
            kind = CONTROL if entry.get("special") else USER_DEFINED
        elif number not in words:
            kind = UNUSED
        else:
            kind = BYTE if bytes_ and _BYTE_TOKEN.fullmatch(text) else NORMAL
        texts.append(text.replace(SPACE, " ") if kind == USER_DEFINED else text)
        kinds.append(kind)
    return _Tokens(texts, kinds)


def _pairs(path: Path, model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges, which older files have as texts."""
    found = []
    for merge in model["merges"]:
        pair = merge.split(" ", 1) if isinstance(merge, str) else list(merge)
        if len(pair) != 2:
            raise BadFileError(
                path, f"its tokenizer has the merge {str(merge)[:40]!r}, which is no pair", "Get it again"
            )
        found.append((pair[0], pair[1]))
    return found


def _add_byte_level(
    made: Vocabulary,
    path: Path,
    described: Mapping[str, Any],
    tokens: _Tokens,
    tokenizer: PreTrainedTokenizerFast,
    forced: str | None,
) -> None:
    pairs = _pairs(path, described["model"])
    if any(" " in part for pair in pairs for part in pair):
        raise UserError(f"{path} has merges of tokens with spaces, which no byte-level tokenizer of llama.cpp has")
    name, notes = _pre_tokenizer(path, described, tokenizer, forced)
    made.notes += notes
    made.values |= {
        PREFIX + "model": "gpt2",
        PREFIX + "pre": name,
        PREFIX + "tokens": tokens.texts,
        PREFIX + "token_type": tokens.kinds,
        PREFIX + "merges": [f"{left} {right}" for left, right in pairs],
    }


def _pre_tokenizer(
    path: Path, described: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, forced: str | None
) -> tuple[str, list[str]]:
    """llama.cpp's name of the rule that cuts text, and notes. Raises ``UserError`` where it has none."""
    digest = pre_tokenizers.check_hash(tokenizer.encode(pre_tokenizers.CHECK_TEXT))
    by_hash, by_description = pre_tokenizers.name_of_hash(digest), pre_tokenizers.name_of_description(described)
    found, known = by_hash or by_description, pre_tokenizers.known_names()
    if forced is not None:
        if forced not in known:
            raise UserError(f"pre-tokenizer {forced!r} is none that llama.cpp has; known: {', '.join(known)}")
        because = "it is unknown" if found is None else f"by its behaviour it is {found!r}"
        return forced, [] if forced == found else [f"the pre-tokenizer was set to {forced!r} as asked for; {because}"]
    if by_hash is not None:
        return by_hash, []
    if by_description is not None:
        return by_description, [
            f"llama.cpp does not know this vocabulary (hash {digest[:16]}); its tokenizer.json cuts text by the rule that "
            f"llama.cpp calls {by_description!r}, and that is what the file says"
        ]
    raise UserError(
        f"{path} cuts text into words by a rule that llama.cpp does not know (hash {digest}); known: {', '.join(known)}. "
        "Where one of them fits, name it by the option pre-tokenizer of format gguf; another cut gives other tokens, which "
        "only looks like a worse model"
    )


def _add_sentence_piece(made: Vocabulary, path: Path, described: Mapping[str, Any], tokens: _Tokens) -> None:
    """Pieces with scores: minus the place of a piece among the merges, so that the first merge wins as it does there."""
    pairs = _pairs(path, described["model"])
    places: dict[str, int] = {}
    for left, right in pairs:
        places.setdefault(left + right, len(places))
    scores = [-float(places.get(text, len(places))) for text in tokens.texts]
    numbers = {text: n for n, text in enumerate(tokens.texts) if tokens.kinds[n] != UNUSED}
    again = merges_of_scores(numbers, tuple(scores), tuple(tokens.kinds))
    if set(again) != set(pairs) or [a + b for a, b in again] != [a + b for a, b in pairs]:
        raise UserError(
            f"{path} merges pieces in an order that no scores of pieces give, by which llama.cpp's SentencePiece tokenizer "
            "goes"
        )
    made.values |= {
        PREFIX + "model": "llama",
        PREFIX + "pre": "default",
        PREFIX + "tokens": tokens.texts,
        PREFIX + "scores": scores,
        PREFIX + "token_type": tokens.kinds,
        PREFIX + "add_space_prefix": _prefixed(described),
    }


def _prefixed(described: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front."""
    normalizer, cutter = described.get("normalizer") or {}, described.get("pre_tokenizer") or {}
    steps = [*normalizer.get("normalizers", [normalizer]), *cutter.get("pretokenizers", [cutter])]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _add_special(
    values: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tokens: _Tokens, ends: Sequence[int]
) -> None:
    """Numbers of special tokens, and whether a text gets some around it, as the tokenizer's behaviour shows."""
    for attribute, name in SPECIAL.items():
        number = getattr(tokenizer, f"{attribute}_id", None)
        if type(number) is int and 0 <= number < len(tokens.texts):
            values[f"{PREFIX}{name}_token_id"] = number
    first = tokenizer.eos_token_id
    ends = [number for number in (first, *ends) if type(number) is int and 0 <= number < len(tokens.texts)]
    for name, number in zip(("eos", "eot", "eom"), dict.fromkeys(ends)):
        values[f"{PREFIX}{name}_token_id"] = number
    ids = list(tokenizer.encode("a"))
    inside = list(tokenizer.encode("a", add_special_tokens=False))
    values[f"{PREFIX}add_bos_token"] = ids[: len(ids) - len(inside)] == [tokenizer.bos_token_id] and ids[1:] == inside
    values[f"{PREFIX}add_eos_token"] = ids[-1:] == [tokenizer.eos_token_id] and ids != inside


def _add_templates(values: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    template = tokenizer.chat_template
    named = template if isinstance(template, dict) else {"default": template} if template else {}
    others = [name for name in named if name != "default"]
    if "default" in named:
        values[TEMPLATE] = named["default"]
    values |= {f"{TEMPLATE}.{name}": named[name] for name in others}
    if others:
        values["tokenizer.chat_templates"] = others


def _compare(made: Vocabulary, path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Note where what quern reads back from the metadata makes other tokens of the check text."""
    if made.values[PREFIX + "model"] == "gpt2" and pre_tokenizers.rule_named(made.values[PREFIX + "pre"]) is None:
        return
    metadata = {key: tuple(value) if isinstance(value, list) else value for key, value in made.values.items()}
    text = pre_tokenizers.CHECK_TEXT
    if list(tokenizer_of(path, metadata).encode(text)) != list(tokenizer.encode(text)):
        made.notes.append(
            "the tokenizer in the file makes other tokens of a test text than the checkpoint's; compare both on your texts"
        )

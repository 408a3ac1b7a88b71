"""Beginnings of texts for a model to go on from: windows of texts, and of conversations what precedes the first answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from quern.core.errors import UserError, option
from quern.core.recipe_parts import Calibration
from quern.core.seeds import generator
from quern.pipeline.blockwise.calibration_text import CalibrationText
from quern.texts.records import RecordError
from quern.texts.source import Text, TextFile, read_text
from quern.texts.tokens import begun, check_vocabulary, leading_special, text_ids


@dataclass(frozen=True)
class Beginning:
    """What a model reads first, and how many tokens it may write behind it."""

    ids: list[int]
    opening: str | None
    """The text of a conversation's opening, which stands in the record as it is; None for a window of a text."""
    count: int

    def record(self, tokenizer: Any, written: list[int]) -> str:
        """The whole text. Of an answer all tokens count, also that which ends it."""
        if self.opening is not None:
            answer = tokenizer.decode(written, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            return self.opening + str(answer)
        ids = [*self.ids, *written]
        text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.strip("\ufffd")  # a window, or the last token, may cut through a character


@dataclass(frozen=True)
class Lengths:
    """Tokens of beginnings that are cut from texts, of whole records, and of what the model can read at most."""

    begin: int
    whole: int
    context: int


class _Windows(CalibrationText):
    """Beginnings cut from texts as calibration sequences are."""

    def _too_short(self, count: int, time: int, wanted: int) -> UserError:
        return UserError(
            f"the text has {count} tokens, and a beginning {time}. Give more text with {option('texts', '--text')}, or a "
            f"smaller {option('begin', '--begin')}"
        )


class _Opening:
    """A ``Chat`` that writes the messages before a conversation's first answer, and what answers begin with."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.used = tokenizer, False

    def __call__(self, messages: list[dict[str, str]]) -> str:
        self.used = True
        roles = [message["role"] for message in messages]
        asked = messages[: roles.index("assistant")] if "assistant" in roles else messages
        if not asked or asked[-1]["role"] != "user":
            return ""
        try:
            return str(self._tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program of its author's, and fails as it likes
            raise RecordError(f"is refused by the model's chat template: {error}") from None


def beginnings(
    texts: Sequence[Text | TextFile], tokenizer: Any, lengths: Lengths, vocabulary: int, wanted: int, seed: int
) -> tuple[list[Beginning], list[str]]:
    """Up to ``wanted`` beginnings of every source, the sources taking turns, and notes of what was read.

    Each file of conversations is a source, and all other texts together are one (without any texts: modules of the running
    Python's standard library). Raises ``UserError`` where a text is too short, ``BadFileError`` for files that cannot be
    used.
    """
    conversations = [text for text in texts if isinstance(text, TextFile) and _is_conversations(text, tokenizer)]
    plain = [text for text in texts if text not in conversations]
    sources: list[list[Beginning]] = []
    notes: list[str] = []
    if plain or not conversations:
        sources.append(_windows(plain, tokenizer, lengths, vocabulary, wanted, seed, notes))
    for place, file in enumerate(conversations):
        sources.append(_openings(file, tokenizer, lengths, wanted, seed + place, notes))
    found = [one for one in chain.from_iterable(zip_longest(*sources)) if one is not None]
    check_vocabulary((max(one.ids) for one in found), tokenizer, vocabulary)
    return found, notes


def _is_conversations(text: TextFile, tokenizer: Any) -> bool:
    """Whether the records of a file go through the chat template."""
    if text.format == "text":
        return False
    opening = _chat(tokenizer)
    for _ in text.read(opening, articles=False):
        break
    return opening is not None and opening.used


def _chat(tokenizer: Any) -> _Opening | None:
    return _Opening(tokenizer) if getattr(tokenizer, "chat_template", None) else None


def _windows(
    texts: list[Text | TextFile],
    tokenizer: Any,
    lengths: Lengths,
    vocabulary: int,
    wanted: int,
    seed: int,
    notes: list[str],
) -> list[Beginning]:
    settings = Calibration(tokens=wanted * lengths.begin, sequence_length=lengths.begin)
    text = _Windows(_paths(texts), tokenizer, settings)
    windows = text.sequences(lengths.context, vocabulary, seed, or_fewer=True).tolist()
    notes += text.notes
    special = leading_special(tokenizer)
    found = []
    for window in generator(seed, "beginnings").permutation(windows).tolist():
        ids = begun(special, window)
        found.append(Beginning(ids, None, lengths.whole - len(ids)))
    return found


def _paths(texts: list[Text | TextFile]) -> list[str | Path | Text]:
    return [text if isinstance(text, Text) else text.path for text in texts]


def _openings(
    file: TextFile, tokenizer: Any, lengths: Lengths, wanted: int, seed: int, notes: list[str]
) -> list[Beginning]:
    """Of conversations that are drawn by the seed, each as likely (Vitter 1985, algorithm R), those that can be answered."""
    random, kept = generator(seed, "openings"), list[str]()
    reading = file.read(_chat(tokenizer), articles=False)
    for number, document in enumerate(reading, start=1):
        place = len(kept) if len(kept) < wanted else int(random.integers(number))
        if place < wanted:
            kept[place : place + 1] = ["".join(document)]
    notes += [reading.note] if reading.note else []
    found = []
    for opening in random.permutation(kept).tolist():
        ids = text_ids(tokenizer, opening)
        if (room := lengths.context - len(ids)) > 0:
            found.append(Beginning(ids, opening, min(lengths.whole, room)))
    if not found:
        raise UserError(f"{file.path}: no conversation has a first question that leaves room to answer")
    return found


def read_texts(texts: Sequence[str | Path | Text]) -> list[Text | TextFile]:
    """The user's texts, opened. Raises ``BadFileError``."""
    return [text if isinstance(text, Text) else read_text(text) for text in texts]

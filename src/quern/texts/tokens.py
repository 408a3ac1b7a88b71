"""Text to token ids: one beginning-of-sequence token, no end behind a text, and long texts by pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from quern.core.errors import UserError
from quern.texts.pieces import cut_pieces

CONTEXT = "\n"
"""Stands in front of a piece that continues a text, so that it is tokenized as inside of one; its tokens are dropped."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        """Token ids of ``text``."""
        ...

    def decode(self, token_ids: list[int]) -> str:
        """The text that the ids spell."""
        ...


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of ``text`` and of nothing else."""
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def leading_special(tokenizer: Tokenizer) -> list[int]:
    """The beginning-of-sequence token if the tokenizer puts one in front of text, else nothing."""
    special = tokenizer.encode("", add_special_tokens=True, verbose=False)
    return special[:1] if special and special[0] == tokenizer.bos_token_id else []


def begun(prefix: Sequence[int], ids: list[int]) -> list[int]:
    """``ids`` behind ``prefix`` (what ``leading_special`` found), once: a text may spell the token itself."""
    return ids if prefix and ids[:1] == list(prefix) else [*prefix, *ids]


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """``text`` as a model reads it: behind the beginning-of-sequence token where the tokenizer has that habit.

    A tokenizer that ends texts by an end-of-sequence token does not here, because what is read goes on.
    """
    return begun(leading_special(tokenizer), plain_ids(tokenizer, text))


def document_ids(tokenizer: Tokenizer, strings: Iterable[str]) -> Iterator[list[int]]:
    """Token ids of one text that comes in ``strings``, a list for each piece of it.

    A text of at most ``pieces.PIECE`` characters is one piece. Longer ones are cut where words or lines begin, and each
    piece is tokenized behind a line end, which makes the same tokens as the whole text does with tokenizers that split
    words and lines first; memory and time go with what is taken.
    """
    context: list[int] | None = None
    for piece in cut_pieces(strings):
        if context is None:
            yield plain_ids(tokenizer, piece)
            context = plain_ids(tokenizer, CONTEXT)
            continue
        ids = plain_ids(tokenizer, CONTEXT + piece)
        follows = ids[: len(context)] == context
        yield ids[len(context) :] if follows else plain_ids(tokenizer, piece)


def check_vocabulary(ids: Iterable[int], tokenizer: Tokenizer, vocabulary_size: int) -> None:
    """Raises ``UserError`` if one of ``ids`` is not a row of the embedding.

    A tokenizer may know more tokens than the embedding has rows (added ones, such as padding): only those that occur count.
    """
    largest = int(max(ids, default=0))
    if largest >= vocabulary_size:
        raise UserError(
            f"the text has token {largest} ({tokenizer.decode([largest])!r}), and the embedding has {vocabulary_size} rows, "
            f"0 to {vocabulary_size - 1}. Leave that token out of the text, or use the tokenizer that belongs to this model"
        )

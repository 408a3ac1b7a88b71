"""Choices: minimal pairs and multiple choice, decided by the total log-likelihood of each option.

A JSONL file has one item a line. BLiMP's form (Warstadt et al. 2020): ``{"sentence_good": ..., "sentence_bad": ...}``.
Multiple choice: ``{"prompt": ..., "choices": [...], "answer": 0}`` with the number of the right choice. Other keys are
let be. An item is right if the right option is strictly more likely than every other: a tie is no knowledge.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quern.checkpoint.files import sha256_of, write_bytes
from quern.core import metrics
from quern.core.engine import LoadedModel
from quern.core.errors import BadFileError, UserError
from quern.core.text.encoding import whole_characters
from quern.evaluation.batches import batched_logits
from quern.texts.stream import characters, first_bytes, lines
from quern.texts.tokens import Tokenizer, begun, check_vocabulary, leading_special, plain_ids

_FORMS = '{"sentence_good": "...", "sentence_bad": "..."} or {"prompt": "...", "choices": ["...", "..."], "answer": 0}'


@dataclass(frozen=True)
class Item:
    """A multiple-choice item or a minimal pair."""

    prompt: str
    options: tuple[str, ...]
    """At least two, none empty; what follows the prompt."""
    answer: int
    """Number of the right option."""


@dataclass(frozen=True)
class ChoiceSet:
    """A named file of items."""

    name: str
    items: tuple[Item, ...]
    sha256: str


@dataclass(frozen=True)
class Option:
    """One option as the model sees it."""

    item: int
    right: bool
    ids: NDArray[np.int64]
    """Prompt and option, ``(time,)``."""
    first: int
    """Position of the first token that counts, at least 1."""


def read_choices(path: str | Path) -> ChoiceSet:
    """Items of a JSONL file, also gzipped. Raises ``BadFileError`` with the line number of a line that is neither form."""
    path = Path(path)
    first_bytes(path)
    rows = enumerate(lines(characters(path)), start=1)
    items = [_read_item(path, number, line) for number, line in rows if line.strip()]
    if not items:
        raise BadFileError(path, "holds no items", f"Each line is {_FORMS}")
    return ChoiceSet(path.name, tuple(items), sha256_of(path))


def _read_item(path: Path, number: int, line: str) -> Item:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadFileError(path, f"line {number} is not JSON: {error}", f"Each line is {_FORMS}") from None
    item = _parse(data)
    if isinstance(item, str):
        raise BadFileError(path, f"line {number} {item}", f"Each line is {_FORMS}")
    return item


def _parse(data: Any) -> Item | str:
    """The item, or what is wrong with it."""
    if not isinstance(data, dict):
        return f"is a JSON {type(data).__name__}, not an object"
    prompt, options, answer = data.get("prompt"), data.get("choices"), data.get("answer")
    if "sentence_good" in data or "sentence_bad" in data:
        prompt, options, answer = "", [data.get("sentence_good"), data.get("sentence_bad")], 0
    if not isinstance(prompt, str):
        return "has no text under prompt"
    if not isinstance(options, list) or not all(isinstance(option, str) and option for option in options):
        return "has options that are not all texts with something in them"
    if len(options) < 2 or len(set(options)) < len(options):
        return f"needs at least two options that differ; it has {len(set(options))}"
    if type(answer) is not int or not 0 <= answer < len(options):
        return f"has the answer {answer!r}; it must be the number of a choice, 0 to {len(options) - 1}"
    return Item(whole_characters(prompt), tuple(map(whole_characters, options)), answer)


def encode_choices(
    sets: Sequence[ChoiceSet], tokenizer: Tokenizer, *, vocabulary_size: int, context: int | None = None
) -> list[Option]:
    """All options of all items as token ids.

    The options of an item are scored from one place: where the encodings of the prompt and of the prompt with each
    option first differ (``common_start``). A first token must follow something to be scored: where the tokenizer puts
    nothing in front of text and the encodings have nothing in common, the beginning- or else the end-of-sequence token
    stands there (lm-eval does the same). Raises ``UserError`` for ids outside the vocabulary, and for an item that is
    longer than the model's ``context``.
    """
    prefix = leading_special(tokenizer)
    options = []
    places = [(choices.name, place) for choices in sets for place in range(1, len(choices.items) + 1)]
    for number, item in enumerate(item for choices in sets for item in choices.items):
        name, place = places[number]
        prompt = begun(prefix, plain_ids(tokenizer, item.prompt)) if item.prompt else prefix
        encoded = [begun(prefix, plain_ids(tokenizer, item.prompt + text)) for text in item.options]
        first = common_start([prompt, *encoded])
        for text, ids in zip(item.options, encoded):
            if len(ids) <= first:
                raise UserError(f"{name}, item {place}: option {text!r} adds no token to its prompt; give it some text")
        if first == 0:
            front = _separator(tokenizer)
            encoded, first = [front + ids for ids in encoded], len(front)
        if context is not None and (longest := max(map(len, encoded))) > context:
            raise UserError(
                f"{name}, item {place}: prompt and option have {longest} tokens, and the model's context is {context}. "
                "Leave the item out, or shorten it"
            )
        for index, ids in enumerate(encoded):
            options.append(Option(number, index == item.answer, np.array(ids, dtype=np.int64), first))
    check_vocabulary([int(option.ids.max()) for option in options], tokenizer, vocabulary_size)
    return options


def common_start(encodings: Sequence[list[int]]) -> int:
    """How many tokens all ``encodings`` begin with in common: from there on their log-likelihoods can be compared.

    A token across the seam of prompt and option makes an encoding differ from the prompt's before the seam. Were such an
    option scored from there and another one from the seam, the first would pay for a piece of the prompt, or the other
    one get it for nothing. From a common start the probabilities of options none of which begins another add up to at
    most 1.
    """
    if not encodings:
        return 0
    first, last = min(encodings), max(encodings)  # in dictionary order: the others lie between them
    count = 0
    while count < min(len(first), len(last)) and first[count] == last[count]:
        count += 1
    return count


def _separator(tokenizer: Tokenizer) -> list[int]:
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise UserError(
            "items whose options have no first token in common need a tokenizer with a bos_token or an eos_token to "
            "stand in front; this one has neither. Add one to tokenizer_config.json, or give each item a longer prompt"
        )
    return [token]


def score_options(
    model: LoadedModel, options: Sequence[Option], advance: Callable[[int], None] = lambda count: None
) -> list[bool]:
    """Whether the model finds the right option most likely, for each item. Raises ``NonFiniteError``."""
    if not options:
        raise UserError("there are no items to score")
    nats = np.empty(len(options))
    for number, logits in batched_logits(model, [option.ids for option in options]):
        option = options[number]
        nats[number] = metrics.nats_per_token(logits[option.first - 1 : -1], option.ids[option.first :]).sum()
        advance(1)
    items = np.array([option.item for option in options])
    right = np.array([option.right for option in options])
    best_wrong = np.full(items.max() + 1, np.inf)
    np.minimum.at(best_wrong, items[~right], nats[~right])
    return [bool(nats[number] < best_wrong[items[number]]) for number in np.flatnonzero(right)]


def save_options(path: Path, options: Sequence[Option]) -> None:
    """Write the options for another process, atomically."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        ids=np.concatenate([option.ids for option in options]),
        lengths=np.array([len(option.ids) for option in options]),
        items=np.array([option.item for option in options]),
        right=np.array([option.right for option in options]),
        first=np.array([option.first for option in options]),
    )
    write_bytes(path, buffer.getvalue())


def load_options(path: Path) -> list[Option]:
    """The options that ``save_options`` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        ids, lengths, items, right, first = (stored[key] for key in ("ids", "lengths", "items", "right", "first"))
    pieces = np.split(ids, np.cumsum(lengths)[:-1])
    return [
        Option(int(item), bool(is_right), piece, int(start))
        for item, is_right, piece, start in zip(items, right, pieces, first)
    ]

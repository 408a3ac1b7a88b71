"""Continue a text with a model: prompt in, pieces of text out, one token at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.tokenizer import load_tokenizer
from quern.core.engine import LimitedSession, NotingModel, SpeculativeSession
from quern.core.errors import UserError
from quern.engines.base import AUTO, ENGINES, engine_for
from quern.engines.cpu import CpuEngine, cache_named
from quern.generation.detokenize import Detokenizer
from quern.generation.sampling import Sampler, SamplingOptions
from quern.generation.speculation.continuation import speculated
from quern.generation.speculation.opening import SpeculationOptions, open_speculation
from quern.generation.speculation.speculation import MOST_TOKENS, Speculation
from quern.generation.stopping import end_tokens
from quern.loading.fitting import open_model
from quern.texts.tokens import check_vocabulary, text_ids

if TYPE_CHECKING:
    from quern.core.engine import LoadedModel, Session

Tell = Callable[[str], None]
"""Takes what a person should know about how a model runs."""
warn: Tell = logging.getLogger("quern").warning


def generate(
    path: str | Path,
    prompt: str,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    threads: int | None = None,
    engine: str = AUTO,
    cache: str | None = None,
    speculate: str = "none",
    draft: str | None = None,
    draft_tokens: int = MOST_TOKENS,
    tell: Tell = warn,
) -> Iterator[str]:
    """Load the model at ``path`` (artifact, folder, Hub id) and return its continuation of ``prompt``, piece by piece.

    Ends at a token that ends texts or turns (``stopping.end_tokens``), after ``max_tokens`` tokens, or when the model's
    context is full, or as much of it as memory has room for. The pieces hold whole characters and join to the text. The
    same seed gives the same text.
    ``cache``: how the cpu engine keeps keys and values: ``float16``, ``int8``, ``int4``, ``float32``; None: ``float16``, and
    ``float32`` where a value is too large for that. ``speculate="ngram"`` guesses up to ``draft_tokens`` tokens at a time
    from what the text said before, ``draft`` by a small model of the same tokenizer: the same text in fewer passes over the
    weights. ``tell`` is called with notes; without it they are logged. Raises ``UserError`` for options out of range and for
    a prompt that is empty or does not fit; all of it before the first piece.
    """
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; give how many tokens to write at most, 1 or more")
    sampler = Sampler(SamplingOptions(temperature, top_k, top_p), seed)
    speculation_options = SpeculationOptions(speculate, draft, draft_tokens)
    checkpoint = open_model(path)
    tokenizer = load_tokenizer(checkpoint.path)
    ids = _encode(tokenizer, prompt)
    model = load_model(checkpoint, engine, threads, cache, tell)
    check_vocabulary(ids, tokenizer, model.vocabulary_size)
    room = model.maximum_length - len(ids)
    if room < 1:
        raise UserError(
            f"the prompt has {len(ids)} tokens and the model's context {model.maximum_length}, which leaves no room to "
            "continue; give a shorter prompt"
        )
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    load = partial(load_model, engine=AUTO, threads=threads, cache=None, tell=tell)
    speculation = open_speculation(speculation_options, model, tokenizer, load)
    session = model.start()
    end = end_tokens(checkpoint, tokenizer)
    count = fitting(session, ids, min(max_tokens, room))
    tokens = continued(session, ids, count, sampler, end, speculation)
    return pieces(noted(tokens, model, tell), Detokenizer(decode, ids))


def load_model(checkpoint: Checkpoint, engine: str, threads: int | None, cache: str | None, tell: Tell) -> LoadedModel:
    """The model in the engine called ``engine``, or in the fastest that runs it. Raises ``UserError``."""
    for note in checkpoint.notes:
        tell(note)
    chosen = engine_for(checkpoint, engine)
    if engine == AUTO and (reason := ENGINES.get("cpu")().runs(checkpoint)) is not None:
        tell(f"runs on the {chosen} engine, which is slower than the cpu engine, because {reason}")
    if (precision := cache_named(cache, chosen)) is not None:
        return CpuEngine().load(checkpoint.path, threads=threads, cache=precision)
    return ENGINES.get(chosen)().load(checkpoint.path, threads=threads)


def fitting(session: Session, ids: list[int], count: int) -> int:
    """How many of ``count`` tokens ``session`` has room for after ``ids``. Raises ``UserError`` where it has for none."""
    if not isinstance(session, LimitedSession):
        return count
    length = session.length + len(ids)
    if length >= session.capacity:
        raise UserError(
            f"the text has {length} tokens and {session.limit}, which leaves no room to continue; give a shorter one"
        )
    return min(count, session.capacity - length)


def continuation(session: Session, ids: list[int], count: int, sampler: Sampler, end: frozenset[int]) -> Iterator[int]:
    """Up to ``count`` tokens after ``ids``, which are fed to ``session``; a token of ``end`` ends them and is left out.

    Ends early where the session is full. Raises ``UserError`` where it has no room for the first.
    """
    given, limited = ids, isinstance(session, LimitedSession)
    for _ in range(fitting(session, ids, count)):
        if limited and session.length + len(given) > cast(LimitedSession, session).capacity:
            return  # it has less room than at first, since it keeps wider numbers
        token = sampler.choose(session.feed(given).numpy())
        if token in end:
            return
        yield token
        given = [token]


def continued(
    session: Session,
    text: list[int],
    count: int,
    sampler: Sampler,
    end: frozenset[int],
    speculation: Speculation | None,
) -> Iterator[int]:
    """``continuation`` of ``text``, with which ``session`` has begun, guessed where there is ``speculation``."""
    given = text[session.length :]
    if speculation is None or not isinstance(session, SpeculativeSession):
        return continuation(session, given, count, sampler, end)
    return speculated(session, text, fitting(session, given, count), sampler, end, speculation, "text")


def noted(tokens: Iterator[int], model: LoadedModel, tell: Tell) -> Iterator[int]:
    """``tokens``; calls ``tell`` with each note that ``model`` makes meanwhile."""
    notes = model.notes if isinstance(model, NotingModel) else []
    told = len(notes)
    for token in chain(tokens, [None]):  # also after the last one
        for note in notes[told:]:
            tell(note)
        told = len(notes)
        if token is not None:
            yield token


def pieces(tokens: Iterator[int], detokenizer: Detokenizer) -> Iterator[str]:
    """The text of ``tokens`` as it grows."""
    for token in tokens:
        if piece := detokenizer.push(token):
            yield piece
    if rest := detokenizer.finish():
        yield rest


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("the prompt is not valid UTF-8; give it as text in your terminal's encoding") from None
    ids = text_ids(tokenizer, prompt)
    if not ids:
        raise UserError("the prompt is empty; give at least one character to continue")
    return ids

"""Task suites through EleutherAI's lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), an optional extra.

``language_model(...)`` makes a loaded model one of lm-eval's; its three requests are: the log-likelihood of a
continuation after a context, that of a whole text in windows, and greedy generation until a stop string.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from quern.core import metrics
from quern.core.engine import LoadedModel
from quern.core.errors import UserError
from quern.evaluation.batches import batched_logits
from quern.evaluation.choice import common_start
from quern.texts.tokens import Tokenizer, check_vocabulary, plain_ids, text_ids
from quern.texts.turns import turn_end

DEFAULT_NEW_TOKENS = 256
"""lm-eval's own default for tasks that name no ``max_gen_toks``; half the context where that is less."""


class Request(Protocol):
    """What is used of lm-eval's ``Instance``."""

    args: tuple[Any, ...]


class Requests:
    """lm-eval's requests answered by a loaded model, in the order in which they were asked."""

    def __init__(self, model: LoadedModel, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._model = model
        self._tokenizer = tokenizer
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if prefix is None:
            raise UserError("lm-eval needs a tokenizer with a bos_token or an eos_token; this one has neither")
        self._prefix = prefix
        self._ends = {tokenizer.eos_token_id, turn_end(tokenizer)}

    def loglikelihood(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): log-likelihood in nats, and whether greedy decoding would say the same.

        White space at the end of a context counts as part of the continuation. All continuations that one document has
        after one context are scored from one place, which lies before the seam where a token of one of them spans it
        (``choice.common_start``). A context too long for the model loses its beginning, for all of them alike. Raises
        ``UserError`` for a continuation that alone is too long, and for one that adds no token.
        """
        groups: dict[Any, list[int]] = {}
        for number, request in enumerate(requests):
            document = getattr(request, "task_name", None), getattr(request, "doc_id", None)
            groups.setdefault((document, request.args[0]), []).append(number)
        ids: list[Any] = [None] * len(requests)
        first = [0] * len(requests)
        for (_, context), members in groups.items():
            encoded, start = self._encode(context, [requests[number].args[1] for number in members])
            for number, whole in zip(members, encoded):
                ids[number], first[number] = np.array(whole, dtype=np.int64), start
        return self._score([whole[:-1] for whole in ids], [whole[start:] for whole, start in zip(ids, first)])

    def loglikelihood_rolling(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[float]:
        """For each (text,): its log-likelihood in nats; every token scored once, in windows of the whole context."""
        inputs, scored, owner = [], [], []
        for number, request in enumerate(requests):
            ids = plain_ids(self._tokenizer, request.args[0])
            for start in range(0, len(ids), self._model.maximum_length):
                target = ids[start : start + self._model.maximum_length]
                before = ids[start - 1] if start else self._prefix
                inputs.append(np.array([before, *target[:-1]], dtype=np.int64))
                scored.append(np.array(target, dtype=np.int64))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (likelihood, _) in zip(owner, self._score(inputs, scored)):
            totals[number] += likelihood
        return totals

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """For each (context, arguments): the greedy continuation up to a stop string, without it.

        Raises ``UserError`` for a task that samples.
        """
        return [self._generate(*request.args) for request in requests]

    def _encode(self, context: str, continuations: list[str]) -> tuple[list[list[int]], int]:
        """Token ids of ``context`` with each continuation, and where the part begins that counts, 1 or more."""
        stripped = context.rstrip()
        blank = context[len(stripped) :]
        before = text_ids(self._tokenizer, stripped) if stripped else []
        encode = text_ids if stripped else plain_ids
        encoded = [encode(self._tokenizer, stripped + blank + text) for text in continuations]
        start = common_start([before, *encoded])
        if start == 0:
            encoded, start = [[self._prefix, *whole] for whole in encoded], 1
        if min(map(len, encoded)) <= start:
            raise UserError("a continuation adds no token to its context, so it has no likelihood. Leave this task out")
        longest = max(map(len, encoded))
        surplus = max(0, longest - (self._model.maximum_length + 1))
        if surplus >= start:
            raise UserError(
                f"a continuation has {longest - start} tokens, the model's context {self._model.maximum_length}. "
                "Leave this task out"
            )
        return [whole[surplus:] for whole in encoded], start - surplus

    def _score(self, inputs: list[Any], scored: list[Any]) -> list[tuple[float, bool]]:
        most = self._model.vocabulary_size
        check_vocabulary((token for ids in (*inputs, *scored) for token in ids), self._tokenizer, most)
        results: list[tuple[float, bool]] = [(0.0, True)] * len(inputs)
        for number, logits in batched_logits(self._model, inputs):
            target = scored[number]
            tail = logits[-len(target) :]
            nats = float(metrics.nats_per_token(tail, target).sum())
            results[number] = (-nats, bool((tail.argmax(axis=1) == target).all()))
        return results

    def _generate(self, context: str, arguments: dict[str, Any]) -> str:
        if arguments.get("do_sample") or (arguments.get("temperature") or 0) > 0:
            raise UserError("this task asks for sampling; only greedy generation is measured. Set do_sample: false")
        until = arguments.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        most = int(arguments.get("max_gen_toks") or min(DEFAULT_NEW_TOKENS, self._model.maximum_length // 2))
        prompt = text_ids(self._tokenizer, context) or [self._prefix]
        check_vocabulary(prompt, self._tokenizer, self._model.vocabulary_size)
        if most >= self._model.maximum_length:
            raise UserError(
                f"max_gen_toks {most} leaves no room for a prompt in a context of {self._model.maximum_length}"
            )
        session = self._model.start()
        logits = session.feed(prompt[-(self._model.maximum_length - most) :])
        generated: list[int] = []
        text = ""
        for _ in range(most):
            token = int(logits.argmax())
            if token in self._ends:
                break
            generated.append(token)
            text = self._tokenizer.decode(generated)
            if any(stop in text for stop in stops if stop):
                break
            logits = session.feed([token])
        return _until(text, stops)


def _until(text: str, stops: Sequence[str]) -> str:
    ends = [text.index(stop) for stop in stops if stop and stop in text]
    return text[: min(ends, default=len(text))]


def language_model(model: LoadedModel, tokenizer: Tokenizer) -> Any:
    """An ``lm_eval.api.model.LM`` over a loaded model, for ``lm_eval.simple_evaluate(model=..., tasks=[...])``.

    Raises ``UserError`` if lm-eval is not installed.
    """
    try:
        base = importlib.import_module("lm_eval.api.model").LM
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("lm_eval"):
            raise
        raise UserError("lm-eval is not installed. Run: pip install 'quern[lm-eval]'") from None
    return type("QuernLanguageModel", (Requests, base), {})(model, tokenizer)

"""A model that is served: its engine, its tokenizer, its chat template, and the scheduler that shares it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from quern.checkpoint.files import read_json
from quern.checkpoint.tokenizer import load_tokenizer
from quern.core.engine import BatchModel
from quern.core.errors import UserError
from quern.engines.base import AUTO
from quern.generation.generate import Tell, load_model, warn
from quern.generation.sampling import SamplingOptions
from quern.generation.speculation.opening import SpeculationOptions, open_speculation
from quern.generation.stopping import end_tokens
from quern.loading.fitting import open_model
from quern.serving.embedding import Pooling, pooling_named
from quern.serving.grammar import COMPACT, Grammars, TokenGrammar
from quern.serving.parts import Notation, PartReader, notation_of, opens_thinking
from quern.serving.scheduler import Limits, Scheduler
from quern.texts.tokens import check_vocabulary, text_ids

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """What a model reads, and how its answer is to be read."""

    ids: tuple[int, ...]
    thinking: bool = False
    """Whether the answer begins inside of a thought."""


class ServedModel:
    """Loads the model at ``path`` and answers from ``start`` to ``stop``.

    Options as those of ``generate``. Raises ``UserError``.
    """

    def __init__(
        self,
        path: str | Path,
        name: str,
        *,
        threads: int | None = None,
        engine: str = AUTO,
        cache: str | None = None,
        context: int | None = None,
        limits: Limits = Limits(),  # noqa: B008 - it cannot be changed
        speculation: SpeculationOptions = SpeculationOptions(),  # noqa: B008
        pooling: str = "auto",
        tell: Tell = warn,
    ) -> None:
        checkpoint = open_model(path)
        self._pooling, self._path = pooling, checkpoint.path
        if pooling != "auto":
            pooling_named(pooling, checkpoint.path)
        self.name, self.created = name, int(time.time())
        self.tokenizer = load_tokenizer(checkpoint.path)
        self.ends = end_tokens(checkpoint, self.tokenizer)
        self.model = cast(BatchModel, load_model(checkpoint, engine, threads, cache, tell))
        self.context = min(context or self.model.maximum_length, self.model.maximum_length)
        self.decode: Callable[[list[int]], str] = partial(
            self.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        load = partial(load_model, engine=AUTO, threads=threads, cache=None, tell=tell)
        guesses = open_speculation(speculation, self.model, self.tokenizer, load)
        self.scheduler = Scheduler(self.model, self.decode, self.ends, limits, self.context, guesses)
        self.sampling = usual_sampling(checkpoint.path)
        self._template = str(self.tokenizer.chat_template or "")
        self._notation: Notation = notation_of(self._template)
        self._grammars = Grammars(self.tokenizer, self.model.vocabulary_size, self.ends)

    def start(self) -> None:
        """Begin to answer."""
        self.scheduler.start()

    def stop(self) -> None:
        """End all answers."""
        self.scheduler.stop()

    def prompt_of(self, text: str) -> Prompt:
        """A text that is to be continued. Raises ``UserError`` for an empty one."""
        return self._checked(text_ids(self.tokenizer, text))

    def prompt_of_ids(self, ids: Sequence[int]) -> Prompt:
        """The same of token ids. Raises ``UserError`` for what is none, before the engine does, for all that it runs."""
        size = self.model.vocabulary_size
        if any(not 0 <= token < size for token in ids):
            raise UserError(f"tokens are numbers from 0 to {size - 1}")
        return self._checked(list(ids))

    @property
    def pooling(self) -> Pooling:
        """How a text's vector is made of its tokens'. Raises ``UserError`` for one that is not known."""
        return pooling_named(self._pooling, self._path)

    def text_to_embed(self, given: str | Sequence[int]) -> list[int]:
        """Tokens of a text, with what the tokenizer puts around texts. Raises ``UserError`` for none and for too many."""
        if isinstance(given, str):
            given = self.tokenizer(given)["input_ids"] if given else []
        ids = list(given)
        if not ids:
            raise UserError("a text is empty; give at least one character")
        if len(ids) > self.context:
            raise UserError(f"a text has {len(ids)} tokens and the context is {self.context}; give a shorter one")
        check_vocabulary(ids, self.tokenizer, self.model.vocabulary_size)
        return ids

    def conversation(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Prompt:
        """A conversation as the model's chat template writes it, up to the answer; ``options`` go to the template.

        Raises ``UserError`` for a model without one, and for what the template refuses.
        """
        if not self._template:
            raise UserError(
                f"model {self.name!r} has no chat template, so it is no model for conversations; use /v1/completions"
            )
        given = {key: value for key, value in (options or {}).items() if key not in _RESERVED}
        try:
            text = self.tokenizer.apply_chat_template(
                [_plain(message) for message in messages],
                tools=list(tools) or None,
                add_generation_prompt=True,
                tokenize=False,
                **given,
            )
            text.encode()  # half a surrogate pair is no text, and comes by escapes inside of JSON
        except Exception as error:  # a template is a program of its author's, and fails as it likes
            raise UserError(f"the model's chat template refuses this conversation: {error}") from None
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return Prompt(self._checked(ids).ids, opens_thinking(text))

    def reader(self, prompt: Prompt, tools: Sequence[str]) -> PartReader:
        """Reads the answer to ``prompt``."""
        thinks = "<think>" in self._template or prompt.thinking
        return PartReader(tools=tools, notation=self._notation, thinks=thinks, open=prompt.thinking)

    def json_schema(self, schema: Mapping[str, Any] | bool) -> Callable[[], TokenGrammar]:
        """See ``Grammars.json_schema``."""
        return self._grammars.json_schema(schema)

    def regex(self, expression: str) -> Callable[[], TokenGrammar]:
        """See ``Grammars.regex``."""
        return self._grammars.regex(expression)

    def calls(self, tools: Mapping[str, Mapping[str, Any]]) -> Callable[[], TokenGrammar]:
        """One call of one of ``tools``, by name with the schemas of their parameters, in the model's notation."""
        key = "arguments" if self._notation == "marked" else "parameters"
        choices = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, key: dict(schema) or {"type": "object"}},
                "required": ["name", key],
                "additionalProperties": False,
            }
            for name, schema in tools.items()
        ]
        schema = choices[0] if len(choices) == 1 else {"anyOf": choices}
        if self._notation == "object":
            return self._grammars.json_schema(schema)
        schema = {**schema, "x-guidance": COMPACT}
        opened, closed = (self._mark(mark) for mark in ("<tool_call>", "</tool_call>"))
        grammar = f'start: {opened} "\\n" call "\\n" {closed}\ncall: %json {json.dumps(schema)}\n'
        return self._grammars.lark(grammar, "the parameters of the tools")

    def _mark(self, mark: str) -> str:
        """A mark in a grammar: by name where it is a special token of its own."""
        known = mark in self.tokenizer.get_vocab() and mark in self.tokenizer.get_added_vocab()
        return mark if known else json.dumps(mark)

    def _checked(self, ids: list[int]) -> Prompt:
        if not ids:
            raise UserError("the prompt is empty; give at least one character")
        if len(ids) >= self.context:
            raise UserError(
                f"the prompt has {len(ids)} tokens and the context is {self.context}, which leaves no room to answer; "
                "give a shorter one"
            )
        check_vocabulary(ids, self.tokenizer, self.model.vocabulary_size)
        return Prompt(tuple(ids))


def usual_sampling(path: Path) -> SamplingOptions:
    """How the model's authors would have tokens chosen (``generation_config.json``), where that makes sense; else as the
    protocols say: a temperature of 1."""
    file = path / "generation_config.json"
    said = read_json(file) if file.is_file() else {}
    if said.get("do_sample") is False:
        return SamplingOptions(0.0)
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    values |= {key: said[key] for key in values if type(said.get(key)) in (int, float)}
    try:
        return SamplingOptions(float(values["temperature"]), int(values["top_k"]), float(values["top_p"]))
    except UserError:
        return SamplingOptions(1.0)


_RESERVED = frozenset(("tools", "add_generation_prompt", "tokenize", "conversation", "chat_template"))
"""Arguments of the template that a request may not set beside what it says elsewhere."""


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates know it: content as one text, arguments of calls as objects."""
    found = dict(message)
    content = found.get("content")
    if isinstance(content, list):
        found["content"] = "".join(str(part.get("text", "")) for part in content)
    if calls := found.get("tool_calls"):
        found["tool_calls"] = [_plain_call(call) for call in calls]
    return found


def _plain_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    try:
        function["arguments"] = json.loads(function.get("arguments") or "{}")
    except ValueError:
        raise UserError(f"the arguments of an earlier call of {function.get('name')!r} are no JSON") from None
    return {**call, "function": function}

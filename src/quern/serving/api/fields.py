"""Fields that several requests have, and what they mean for generation."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from quern.generation.sampling import SamplingOptions
from quern.serving.api.errors import RequestError
from quern.serving.grammar import ANY_OBJECT, TokenGrammar
from quern.serving.model import Prompt, ServedModel
from quern.serving.request import GenerationRequest

Text = Annotated[str, Field(max_length=1 << 22)]
Name = Annotated[str, Field(max_length=1024)]
StopText = Annotated[str, Field(max_length=1024)]
T = TypeVar("T")
Several = Annotated[list[T], Field(fail_fast=True, max_length=4096)]
"""Of which a malformed one ends the reading: a million of them would make a million errors."""
Tokens = Annotated[list[int], Field(fail_fast=True, max_length=1 << 20)]
MOST_BIASES = 1024


def _few_biases(given: Any) -> Any:
    """Before its fields are read, of which each malformed one makes an error."""
    if isinstance(given, dict) and len(given) > MOST_BIASES:
        raise ValueError(f"at most {MOST_BIASES} tokens are taken")
    return given


Biases = Annotated[dict[Name, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_few_biases)]


class Body(BaseModel):
    """A request; fields that are not known here are let pass, as clients send many."""

    model_config = ConfigDict(extra="ignore", strict=False)


class JsonSchema(Body):
    """What ``response_format`` names by ``json_schema``."""

    name: Name = "schema"
    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")


class ResponseFormat(Body):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    regex: Text | None = None

    def grammar(self, model: ServedModel) -> Callable[[], TokenGrammar] | None:
        """What constrains the answer."""
        if self.type == "json_object":
            return model.json_schema(ANY_OBJECT)
        if self.type == "json_schema":
            if self.json_schema is None:
                raise RequestError(400, "response_format json_schema lacks its json_schema", "response_format")
            return model.json_schema(self.json_schema.schema_)
        if self.type == "regex":
            if self.regex is None:
                raise RequestError(400, "response_format regex lacks its regex", "response_format")
            return model.regex(self.regex)
        return None


class SamplingFields(Body):
    """How tokens are chosen."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    seed: int | None = None
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=16)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Biases | None = None
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1, le=16)] = 1

    def requests(
        self,
        model: ServedModel,
        prompt: Prompt,
        most: int | None,
        top_logprobs: int | None = None,
        grammar: Callable[[], TokenGrammar] | None = None,
    ) -> list[GenerationRequest]:
        """``n`` requests for answers of at most ``most`` tokens; None: as many as there is room for."""
        room = model.context - len(prompt.ids)
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        seed = secrets.randbits(32) if self.seed is None else self.seed % (1 << 63)
        return [
            GenerationRequest(
                ids=prompt.ids,
                max_tokens=min(room if most is None else most, room),
                sampling=self._sampling(model),
                seed=seed + place,
                stop=tuple(stops),
                ignore_end=self.ignore_eos,
                logit_bias=_bias(self.logit_bias or {}, model.model.vocabulary_size),
                frequency_penalty=self.frequency_penalty,
                presence_penalty=self.presence_penalty,
                top_logprobs=top_logprobs,
                grammar=grammar,
            )
            for place in range(self.n)
        ]

    def _sampling(self, model: ServedModel) -> SamplingOptions:
        usual = model.sampling
        return SamplingOptions(
            usual.temperature if self.temperature is None else self.temperature,
            usual.top_k if self.top_k is None else max(self.top_k, 0),
            usual.top_p if self.top_p is None else self.top_p,
        )


def _bias(given: Mapping[str, float], vocabulary: int) -> tuple[tuple[int, float], ...]:
    found = []
    for token, bias in given.items():
        if not token.isascii() or not token.isdigit() or len(token) > 10 or int(token) >= vocabulary:
            raise RequestError(
                400, f"logit_bias names token {token[:20]!r}; tokens are 0 to {vocabulary - 1}", "logit_bias"
            )
        found.append((int(token), bias))
    return tuple(found)

"""Records: which of a record's fields are text, and how they become one.

A form is a set of fields. The first record decides which form a file has; every other one must have it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Chat = Callable[[list[dict[str, str]]], str]
"""Messages (``role``, ``content``) to text: the model's chat template."""

KNOWN = (
    "known are a list of texts, and records with: text; content; messages or conversations (role and content, or from and "
    "value); prompt and completion; instruction (with input) and output; question and answer"
)
_TEXTS = ("text", "content")
_CONVERSATIONS = ("messages", "conversations", "conversation")
_QUESTIONS = ("instruction", "question", "query", "prompt")
_ANSWERS = ("output", "response", "answer", "completion")
TAKEN = frozenset((*_TEXTS, *_CONVERSATIONS, *_QUESTIONS, *_ANSWERS, "input"))
"""All fields that can be text."""
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
"""Names of the speakers in ShareGPT's form, and what templates call them."""


class RecordError(Exception):
    """What is wrong with a record; whoever knows the file and the record's number says so."""


@dataclass(frozen=True)
class Form:
    """Fields of a record that are taken, and how."""

    fields: tuple[str, ...]
    how: str
    """For a person, such as ``field text``."""
    text: Callable[[Any], str]
    """The text of a record, empty for one without; raises ``RecordError``."""


def chat_of(tokenizer: Any) -> Chat | None:
    """The chat template of a transformers tokenizer; None where it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return None

    def render(messages: list[dict[str, str]]) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template is a program of its author's, and fails as it likes
            raise RecordError(f"is refused by the model's chat template: {error}") from None

    return render


def form_of(record: Any, chat: Chat | None) -> Form | None:
    """The form of a file whose first record this is; None for an unknown one. Raises ``RecordError``."""
    if isinstance(record, str):
        return Form((), "a list of texts", _whole_text)
    if is_conversation(record):
        return Form((), "conversations through the chat template", lambda item: _rendered(_messages(item), chat))
    if not isinstance(record, Mapping):
        return None
    keys = set(_keys(record))
    name = next((name for name in (*_TEXTS, *_CONVERSATIONS) if name in keys), None)
    if name in _TEXTS:
        return Form((name,), f"field {name}", lambda item: _string(item, name))
    if name is not None:
        said = f"field {name} through the chat template"
        return Form((name,), said, lambda item: _rendered(_messages(_value(item, name)), chat))
    return _pair_form(keys, chat)


def _pair_form(keys: set[str], chat: Chat | None) -> Form | None:
    """Of what is asked, with or without an input, and answered."""
    answer = next((name for name in _ANSWERS if name in keys), None)
    question = next((name for name in (*_QUESTIONS, "input") if name in keys), None)
    if answer is None or question is None:
        return None
    fields = (question, *(("input",) if "input" in keys and question != "input" else ()), answer)
    said = ", ".join(fields)
    if fields == ("prompt", "completion"):
        return Form(fields, f"fields {said} one after the other", lambda item: _continued(item, chat))
    if chat is None:
        return Form(fields, f"fields {said}, joined", lambda item: "\n\n".join(filter(None, _strings(item, fields))))
    return Form(fields, f"fields {said} through the chat template", lambda item: _asked(item, fields, chat))


def record_texts(records: Iterator[Any], chat: Chat | None, seen: Callable[[Form], None]) -> Iterator[str]:
    """The text of each record, empty for one without; ``seen`` hears of their form first.

    Raises ``RecordError`` with the record's number.
    """
    form: Form | None = None
    for number, record in enumerate(records, start=1):
        try:
            if form is None:
                form = form_of(record, chat)
                if form is None:
                    raise RecordError(f"has {_shape(record)}; {KNOWN}")
                seen(form)
            yield form.text(record)
        except RecordError as error:
            raise RecordError(f"record {number} {error}") from None


def _shape(record: Any) -> str:
    """What a record of no known form is, for a message."""
    if not isinstance(record, Mapping):
        return f"the JSON type {type(record).__name__}"
    names = [repr(str(key)[:40]) for key in list(record)[:8]]
    return f"the fields {', '.join(names)}{', ...' if len(record) > 8 else ''}" if names else "no fields"


def _keys(record: Mapping[Any, Any]) -> dict[str, Any]:
    """The fields by their names in small letters, which is how they are known."""
    return {str(key).strip().casefold(): value for key, value in record.items()}


def _value(record: Any, name: str) -> Any:
    values = _keys(record) if isinstance(record, Mapping) else {}
    if name not in values:
        raise RecordError(f"has no field {name!r}, which the first one has")
    return values[name]


def _string(record: Any, name: str) -> str:
    value = _value(record, name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RecordError(f"has a value of type {type(value).__name__} under {name!r}, not a text")
    return value


def _strings(record: Any, names: Sequence[str]) -> list[str]:
    return [_string(record, name) for name in names]


def _whole_text(record: Any) -> str:
    if not isinstance(record, str):
        raise RecordError(f"is of type {type(record).__name__}, not a text as the first one")
    return record


def _continued(record: Any, chat: Chat | None) -> str:
    prompt, completion = _value(record, "prompt"), _value(record, "completion")
    if is_conversation(prompt) and is_conversation(completion):
        return _rendered([*_messages(prompt), *_messages(completion)], chat)
    return _string(record, "prompt") + _string(record, "completion")


def _asked(record: Any, fields: Sequence[str], chat: Chat) -> str:
    *asked, answer = _strings(record, fields)
    question = "\n\n".join(filter(None, asked))
    if not question and not answer:
        return ""
    return chat([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def is_conversation(value: Any) -> bool:
    """Whether it is a list of messages with role and content, or from and value."""
    return isinstance(value, list) and bool(value) and all(_is_message(item) for item in value)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ({"role", "content"} <= set(value) or {"from", "value"} <= set(value))


def _messages(value: Any) -> list[dict[str, str]]:
    """Messages as chat templates take them. Raises ``RecordError``."""
    if value is None or value == []:
        return []
    if not is_conversation(value):
        raise RecordError("holds no list of messages with role and content, or from and value")
    found = []
    for item in value:
        role = item["role"] if "role" in item else item["from"]
        content = _content(item["content"] if "content" in item else item["value"])
        if not isinstance(role, str):
            raise RecordError(f"has a message whose role is of type {type(role).__name__}")
        found.append({"role": _ROLES.get(role, role), "content": content})
    return found


def _content(value: Any) -> str:
    """A message's text: a string, or parts of which the texts count."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else None
    if parts is None or not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise RecordError("has a message whose content is not a text")
    return "".join(part["text"] for part in parts)


def _rendered(messages: list[dict[str, str]], chat: Chat | None) -> str:
    if not messages:
        return ""
    if chat is None:
        raise RecordError(
            "is a conversation, and this model's tokenizer has no chat template to write it out; give texts, or the "
            "template as chat_template.jinja in the model's folder"
        )
    return chat(messages)

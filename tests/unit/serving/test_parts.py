"""Thoughts, text and calls are told apart, wherever the pieces end."""

import itertools
import json

import pytest

from quern.serving.parts import PartReader, notation_of, opens_thinking

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
OBJECT = '{"name": "weather", "parameters": {"city": "Rome"}}'


def read(text, size, **options):
    """Joined text and thought, and calls as (name, arguments)."""
    reader = PartReader(**options)
    parts = [part for start in range(0, len(text), size) for part in reader.push(text[start : start + size])]
    parts += reader.finish()
    calls = [(part.call.name, json.loads(part.call.arguments)) for part in parts if part.call]
    return "".join(part.text for part in parts), "".join(part.thought for part in parts), calls


ROME = [("weather", {"city": "Rome"})]
CASES = {
    "text": ("Hello <b> there", {}, ("Hello <b> there", "", [])),
    "marks without tools": (CALL, {}, (CALL, "", [])),
    "call": (CALL, {"tools": ["weather"]}, ("", "", ROME)),
    "text and two calls": (f"So:\n{CALL}\n{CALL}", {"tools": ["weather"]}, ("So:", "", [*ROME, *ROME])),
    "unknown tool": (CALL, {"tools": ["other"]}, (CALL, "", [])),
    "no JSON": ("<tool_call>x</tool_call>", {"tools": ["weather"]}, ("<tool_call>x</tool_call>", "", [])),
    "unfinished call": (CALL[:-12], {"tools": ["weather"]}, ("", "", ROME)),
    "object": (OBJECT, {"tools": ["weather"], "notation": "object"}, ("", "", ROME)),
    "tagged object": (f"<|python_tag|>{OBJECT}", {"tools": ["weather"], "notation": "object"}, ("", "", ROME)),
    "other object": ('{"a": 1}', {"tools": ["weather"], "notation": "object"}, ('{"a": 1}', "", [])),
    "text of an object model": ("Hi {", {"tools": ["weather"], "notation": "object"}, ("Hi {", "", [])),
    "thought": ("<think>\nhm\n</think>\n\nYes", {"thinks": True}, ("Yes", "\nhm", [])),
    "open thought": ("hm\n</think>\n\nYes", {"thinks": True, "open": True}, ("Yes", "hm", [])),
    "unfinished thought": ("<think>hm", {"thinks": True}, ("", "hm", [])),
    "no thought": ("Yes <think>", {"thinks": True}, ("Yes <think>", "", [])),
    "thought and call": (f"<think>hm</think>{CALL}", {"thinks": True, "tools": ["weather"]}, ("", "hm", ROME)),
}


@pytest.mark.parametrize("name", CASES)
def test_parts_do_not_depend_on_where_pieces_end(name):
    text, options, expected = CASES[name]
    for size in (1, 2, 3, 7, len(text)):
        assert read(text, size, **options) == expected, size


def test_text_is_shown_as_soon_as_it_is_certain():
    reader = PartReader(tools=["weather"])
    assert [part.text for part in reader.push("It is ")] == ["It is "]
    assert reader.push("<tool_") == []
    assert [part.text for part in reader.push("box")] == ["<tool_box"]


def test_calls_have_ids_of_their_own():
    reader = PartReader(tools=["weather"])
    ids = [part.call.id for part in itertools.chain(reader.push(CALL + CALL), reader.finish()) if part.call]
    assert len(set(ids)) == 2


def test_templates_say_how_tools_are_called_and_whether_thoughts_are_open():
    assert notation_of("... <tool_call> ... ") == "marked"
    assert notation_of('{"name": f, "parameters": d}') == "object"
    assert opens_thinking("<|im_start|>assistant\n<think>\n")
    assert not opens_thinking("<think></think>")

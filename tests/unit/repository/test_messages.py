"""The catalogues: nothing lacks a translation, nothing is left over, and no text of what is covered is outside of them."""

from __future__ import annotations

import ast
import gettext
import io
import itertools
import string
from pathlib import Path

import pytest
from repository_tools import load_tool

from quern.cli.options import SCENARIOS
from quern.core.text.language import languages

pytest.importorskip("babel", reason="babel is not installed (pip install '.[dev]')")

messages = load_tool("messages")
SOURCE = Path(__file__).parents[3] / "src" / "quern"
CATALOGUES = messages.catalogues()
COVERED = (
    *(
        "advisor/constraints.py",
        "advisor/deployment.py",
        "advisor/drift.py",
        "advisor/machine.py",
        "advisor/no_choice.py",
    ),
    *("advisor/placement.py", "advisor/recommend.py", "advisor/scoring.py", "advisor/wording.py", "report"),
    *(
        "cli",
        "cli/views",
        "core/errors.py",
        "core/stacking.py",
        "core/text",
        "core/text/units.py",
        "formats/fit.py",
        "loading",
    ),
    *("checkpoint/checkpoint.py", "checkpoint/files.py", "checkpoint/folder.py", "checkpoint/jobs/output_place.py"),
    *("pipeline/stacking/answer.py", "pipeline/stacking/check.py", "pipeline/status.py"),
)
"""Files and folders whose texts are all messages."""
NO_TEXTS = (
    *(
        '(() => {\n"use strict";\n',
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; style-src ",
    ),
    *("quern generate ", "quern evaluate ", " --reference MODEL"),
    *("quern quantize MODEL -o OUT --recipe ", "quern quantize MODEL -o OUT --calibration "),
    *(" \\((got |model\\.).*\\)$", "(format [\\w-]+) cannot store ", "Change the recipe", "random_signs: false"),
    *(" tokens/s", SCENARIOS),
)
"""Code, what is typed, units, and what is part of a message."""
SHOWN = ("Text", "add", "table", "plain_table", "TableColumn", "fail", "say", "tell")
"""What takes a text for a person to read: even a single word of it is a message."""
DECLARED = ("Option", "Argument", "verb")
"""What takes help texts, and examples."""
MARKS = ("gettext", "ngettext", "pgettext", "translatable")


@pytest.fixture(scope="module")
def template():
    return messages.template()


def ids(catalog):
    return {(message.context, message.id) for message in catalog if message.id}


def strings(text):
    return (text,) if isinstance(text, str) else tuple(text)


def places(text):
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def test_every_language_has_a_catalogue():
    assert [path.parents[1].name for path in CATALOGUES] == languages()[1:]


@pytest.mark.parametrize("path", CATALOGUES, ids=lambda path: path.parents[1].name)
def test_a_catalogue_has_the_messages_of_the_code_and_no_other(path, template):
    """`make messages` brings it in line."""
    assert ids(messages.load(path)) == ids(template)


@pytest.mark.parametrize("path", CATALOGUES, ids=lambda path: path.parents[1].name)
def test_no_message_lacks_a_translation(path):
    catalog = messages.load(path)
    lacking = [message.id for message in catalog if message.id and not all(strings(message.string))]
    fuzzy = [message.id for message in catalog if message.id and message.fuzzy]
    assert (lacking, fuzzy, list(catalog.obsolete)) == ([], [], [])
    for message in catalog:
        if message.id:
            assert len(strings(message.string)) == (1 if isinstance(message.id, str) else catalog.num_plurals), (
                message.id
            )


@pytest.mark.parametrize("path", CATALOGUES, ids=lambda path: path.parents[1].name)
def test_translations_have_the_places_of_the_message(path):
    for message in messages.load(path):
        if message.id:
            wanted = set.union(*map(places, strings(message.id)))
            for text in strings(message.string):
                assert places(text) == wanted, message.id


@pytest.mark.parametrize("path", CATALOGUES, ids=lambda path: path.parents[1].name)
def test_the_compiled_catalogue_is_that_of_the_text(path):
    """`make messages-compile` writes it; the header names Babel's version and is left out."""
    stored, made = (dict(gettext.GNUTranslations(io.BytesIO(data))._catalog) for data in (
        path.with_suffix(".mo").read_bytes(), messages.compiled(path)))  # fmt: skip
    assert {**stored, "": None} == {**made, "": None}


def test_a_message_in_an_argument_of_another_is_found():
    code = b'gettext("a {b}", b=beyond(1, gettext("the {c}", c=ngettext("{n} d", "{n} ds", 2, n=2))))'
    found = [texts for _, _, texts, _ in messages.from_python(io.BytesIO(code), messages.KEYWORDS, (), {})]
    assert found == ["a {b}", "the {c}", ("{n} d", "{n} ds")]


def loose_texts(path):
    """Texts for people in the file that no message is made of, with their lines."""
    tree = ast.parse(path.read_text("utf-8"))
    told = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called(node) in MARKS:
            told |= {id(arg) for arg in node.args}
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            told.add(id(node.value))  # a docstring
        if isinstance(node, ast.Call) and called(node) in DECLARED:  # and what they declare is a message as a whole
            told |= {id(part) for part in ast.walk(node)}
        if isinstance(node, ast.keyword) and node.arg in ("style", "epilog"):
            told |= {id(part) for part in ast.walk(node.value)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called(node) in SHOWN:
            words = [
                part for arg in node.args for part in constants(arg) if id(part) not in told and letters(part.value) > 1
            ]
            found += [(part.lineno, part.value) for part in words]
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in told
            and sentence(node.value)
        ):
            found.append((node.lineno, node.value))
    return sorted(set(found))


def called(node):
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def constants(node):
    """The strings that ``node`` shows as they are; what another call makes of strings is that call's."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node
    elif isinstance(node, ast.JoinedStr | ast.Tuple | ast.List | ast.BinOp | ast.IfExp):
        for child in ast.iter_child_nodes(node):
            yield from constants(child)


def letters(text):
    return sum(character.isalpha() for character in text)


def sentence(text):
    """Two words in a row: what no key, name or format is."""
    words = text.split(" ")
    return any(letters(one) > 1 and letters(other) > 1 for one, other in itertools.pairwise(words))


@pytest.mark.parametrize("name", COVERED)
def test_no_text_is_outside_of_the_catalogue(name, template):
    known = {text for _, message in ids(template) for text in strings(message)} | set(NO_TEXTS)
    paths = sorted((SOURCE / name).glob("*.py")) if (SOURCE / name).is_dir() else [SOURCE / name]
    found = [(path.name, *loose) for path in paths for loose in loose_texts(path) if loose[1] not in known]
    assert not found


def test_loose_texts_are_noticed(tmp_path):
    file = tmp_path / "loose.py"
    file.write_text(
        '"""A docstring of two words."""\nadd(facts, "size", f"{x} of all")\nx = gettext("two words") + "three more words"\n'
    )
    assert [text for _, text in loose_texts(file)] == [" of all", "size", "three more words"]

"""The messages that people read: from the code into each catalogue (``update``), and catalogues compiled (``compile``).

A catalogue is ``src/quern/locale/<language>/LC_MESSAGES/quern.po``; the ``.mo`` beside it is what the package reads, and is
committed, because an installation has no Babel. ``update`` keeps translations, empties new ones, and drops what no code says
any more. Messages are the arguments of ``gettext``, ``ngettext`` and ``translatable``, the help texts of all commands, and
what measures and ``Traits`` declare.
"""

from __future__ import annotations

import ast
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from babel.messages.catalog import Catalog
from babel.messages.extract import extract_from_dir
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "quern"
LOCALE = PACKAGE / "locale"
OPTIONS = {"report/**.html": {"trimmed": "true", "silent": "false"}, "report/**.js": {"template_string": "false"}}
KEYWORDS = {"gettext": None, "ngettext": (1, 2), "pgettext": ((1, "c"), 2), "translatable": None}
WIDTH = 120


def from_python(file: IO[bytes], keywords: Any, *_: object, **__: object) -> Iterator[tuple[int, str, Any, list[str]]]:
    """The messages of a Python file. Babel's own method loses calls that are deep in the arguments of another."""
    for node in ast.walk(ast.parse(file.read())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in keywords:
            texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            if texts:
                yield node.lineno, node.func.id, texts[0] if len(texts) == 1 else tuple(texts), []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Traits":
            for keyword in node.keywords:
                clauses = keyword.value.values if isinstance(keyword.value, ast.Dict) else [keyword.value]
                for clause in clauses:
                    if isinstance(clause, ast.Constant):
                        yield clause.lineno, "gettext", clause.value, []


METHODS: list[tuple[str, Any]] = [
    ("**.py", from_python),
    ("report/**.html", "jinja2.ext:babel_extract"),
    ("report/**.js", "javascript"),
]


def declared() -> Iterator[tuple[str, str]]:
    """File and text of what is declared as plain data and translated where it is shown."""
    from typer.main import get_command

    from quern.cli.main import app
    from quern.cli.terminal.language import help_texts
    from quern.evaluation.measures.base import all_measures

    for found in help_texts(get_command(app)):
        yield "cli", found
    for measure in all_measures():
        for text in (measure.title, measure.help, measure.heading, measure.interval_heading):
            if text:
                yield "evaluation/measures", text


def template() -> Catalog:
    """All messages of the package, in the order of the files."""
    catalog = Catalog(project="quern", charset="utf-8")
    for file, _, message, _, context in extract_from_dir(PACKAGE, METHODS, OPTIONS, KEYWORDS):
        catalog.add(message, locations=[(file, 0)], context=context)
    for place, message in declared():
        catalog.add(message, locations=[(place, 0)])
    return catalog


def catalogues() -> list[Path]:
    """The catalogues of all languages."""
    return sorted(LOCALE.glob("*/LC_MESSAGES/quern.po"))


def load(path: Path) -> Catalog:
    """The catalogue in the file."""
    with path.open("rb") as file:
        return read_po(file, locale=path.parents[1].name, charset="utf-8")


def updated(path: Path, messages: Catalog) -> bytes:
    """The file's text with all ``messages`` and no other, translations kept; new ones are empty, none is guessed."""
    catalog = load(path)
    catalog.update(messages, no_fuzzy_matching=True, update_header_comment=False, update_creation_date=False)
    catalog.obsolete.clear()
    written = io.BytesIO()
    write_po(written, catalog, width=WIDTH, include_lineno=False, omit_header=False)
    return written.getvalue()


def compiled(path: Path) -> bytes:
    """What the package reads of it."""
    written = io.BytesIO()
    write_mo(written, load(path))
    return written.getvalue()


def main(verb: str) -> int:
    """``update``: every .po; ``compile``: every .mo. Returns how many messages lack a translation."""
    missing = 0
    messages = template() if verb == "update" else None
    for path in catalogues():
        if messages is not None:
            path.write_bytes(updated(path, messages))
        catalog = load(path)
        lacking = [message.id for message in catalog if message.id and not all(_strings(message.string))]
        print(f"{path.relative_to(ROOT)}: {len(catalog)} messages, {len(lacking)} without a translation")
        missing += len(lacking)
        if verb == "compile":
            path.with_suffix(".mo").write_bytes(compiled(path))
    return missing


def _strings(string: str | tuple[str, ...]) -> tuple[str, ...]:
    return (string,) if isinstance(string, str) else string


if __name__ == "__main__":
    if sys.argv[1:] not in (["update"], ["compile"]):
        sys.exit("usage: python tools/messages.py update|compile")
    sys.exit(1 if main(sys.argv[1]) and sys.argv[1] == "compile" else 0)

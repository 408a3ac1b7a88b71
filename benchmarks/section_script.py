"""What the scripts have in common that measure a model in several ways and write one section of a page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pages import write_section

from quern.core.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "models" / "python-7m"
MINE = ROOT / "benchmarks" / "recipes"


def parser_of(doc: str | None, output: str, tokens: int = 8192) -> argparse.ArgumentParser:
    """With the options that all have; ``output``: the folder for what was measured, ``tokens``: scored of each text."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(BUNDLED))
    parser.add_argument("--calibration", nargs="*", default=[], metavar="FILE")
    parser.add_argument("--tokens", type=int, default=tokens)
    parser.add_argument("-o", "--output", default=output)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--from", dest="result", type=Path)
    return parser


def run(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], Path],
    section: Callable[[Mapping[str, Any]], str],
    check: Callable[[argparse.ArgumentParser, argparse.Namespace], None] | None = None,
) -> None:
    """Measure, or take the result that is named, and print its section and write it to the page."""
    options = parser.parse_args()
    if options.result is None:
        if check is not None:
            check(parser, options)
        options.result = measure(options)
        print(options.result)
    text = section(json.loads(options.result.read_text("utf-8")))
    if options.page:
        write_section(options.page, text)
    print(text)


def named_file(given: str) -> tuple[str, str]:
    """A name and a file of ``NAME=FILE``."""
    name, equals, file = given.partition("=")
    if not (name and equals and Path(file).is_file()):
        raise argparse.ArgumentTypeError(f"{given!r} is no NAME=FILE, or there is no such file")
    return name, file


def recipe_called(name: str) -> Recipe:
    """A recipe of this folder, or one that ships."""
    return load_recipe(path if (path := MINE / f"{name}.yaml").is_file() else name)

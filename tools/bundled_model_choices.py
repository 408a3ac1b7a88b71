"""Make the bundled model's minimal pairs: Python as it stands in held-out modules, and spoiled in one place.

The pairs have the form of the BLiMP data (``sentence_good``, ``sentence_bad``, ``UID``), so whatever can
score one can score the other; ``UID`` names the kind of corruption.  Called by ``train_bundled_model.py``.
"""

from __future__ import annotations

import ast
import io
import itertools
import random
import tokenize
from collections.abc import Iterator

from bundled_model_text import heldout


def corruptions(tokens: list[tokenize.TokenInfo], at: int) -> Iterator[tuple[str, int, str]]:
    """Yield (kind, last token, replacement) for each way to spoil the text that starts at token ``at``."""
    here, following = tokens[at], tokens[at + 1]
    pair, line = (here.string, following.string), here.line.strip()
    if here.string == ":" and following.type == tokenize.NEWLINE:
        yield "missing_colon", at, ""
    if pair == ("is", "not"):
        yield "not_before_is", at + 1, "not is"
    if pair == ("not", "in"):
        yield "in_before_not", at + 1, "in not"
    if here.string == ")" and here.type == tokenize.OP:
        yield "wrong_bracket", at, "]"
    if here.string == "==" and line.startswith(("if ", "elif ", "while ")):
        yield "assignment_as_test", at, "="
    if here.string in ("and", "or"):
        yield "foreign_operator", at, {"and": "&&", "or": "||"}[here.string]
    if pair == ("self", ","):
        yield "self_dropped", at + 2, tokens[at + 2].string
    if here.string == "in" and line.startswith("for "):
        yield "for_of", at, "of"
    if pair == ("def", following.string):
        yield "function_for_def", at, "function"
    if here.type == tokenize.INDENT:
        yield "missing_indent", at, here.string[:-4]


def candidate_pairs(text: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield (kind, good, bad, the whole text spoiled in that one place) for two statements at a time."""
    lines = text.splitlines(keepends=True)
    layout = (tokenize.INDENT, tokenize.DEDENT, tokenize.NL, tokenize.COMMENT)
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    statements: list[tuple[int, int]] = []  # first and last row of each, counted from 0
    first: int | None = None
    where = []  # for each token, the number of its statement
    for token in tokens:
        where.append(len(statements))
        if first is None and token.type not in layout:
            first = token.start[0] - 1
        if token.type == tokenize.NEWLINE and first is not None:
            statements.append((first, token.start[0] - 1))
            first = None
    for at in range(len(tokens) - 3):
        for kind, last, replacement in corruptions(tokens, at):
            (row, column), (end_row, end_column) = tokens[at].start, tokens[last].end
            earlier = where[at] - (kind == "missing_indent")  # there the statement before opens the block
            if row != end_row or not 0 <= earlier < len(statements) - 1:
                continue
            top, bottom = statements[earlier][0], statements[earlier + 1][1]
            spoiled = lines.copy()
            spoiled[row - 1] = lines[row - 1][:column] + replacement + lines[row - 1][end_column:]
            margin = lines[top][: len(lines[top]) - len(lines[top].lstrip())]
            shown = [block[top : bottom + 1] for block in (lines, spoiled)]
            if not all(line.startswith(margin) or not line.strip() for block in shown for line in block):
                continue
            good, bad = ("".join(line[len(margin) :] or "\n" for line in block).rstrip() for block in shown)
            if 20 <= len(good) <= 200 and "#" not in good and '"""' not in good:
                yield kind, good, bad, "".join(spoiled)


def choice_pairs(seed: int, per_kind: int = 45) -> list[dict[str, str]]:
    """Return minimal pairs from the held-out modules: statements as they stand, and spoiled in one place."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for name, text in heldout.held_out_text():
        if name in heldout.HELD_OUT_MODULES:
            for kind, good, bad, whole in candidate_pairs(text):
                found.setdefault(kind, {}).setdefault(good, (bad, whole))
    chosen = []
    for kind, pairs in sorted(found.items()):
        order = list(pairs)
        random.Random(f"{seed}-{kind}").shuffle(order)
        sound = (good for good in order if kind == "self_dropped" or not parses(pairs[good][1]))
        chosen += [
            {"sentence_good": good, "sentence_bad": pairs[good][0], "UID": kind}
            for good in itertools.islice(sound, per_kind)
        ]
    return chosen


def parses(text: str) -> bool:
    """Tell whether ``text`` is valid Python, as a corruption must not be."""
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True

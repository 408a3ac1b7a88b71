"""A name that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from quern.core.text.language import gettext


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'hqq'?`` for a ``name`` that is like one of ``known``, else nothing; to end a message with.

    Case and the characters between words count for nothing, and the beginning of exactly one name stands for it.
    """
    spelled = {_plain(other): other for other in known}
    wanted = _plain(name)
    begun = [other for other in spelled if wanted and other.startswith(wanted)]
    near = begun if len(begun) == 1 else difflib.get_close_matches(wanted, spelled, n=1)
    return gettext("; did you mean {name!r}?", name=spelled[near[0]]) if near else ""


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())

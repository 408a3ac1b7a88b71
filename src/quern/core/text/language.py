"""The language that people are spoken to in: English as it stands in the code, others by their gettext catalogues.

A sentence is one message with named places, ``gettext("decodes {rate} tokens/s", rate=text)``, so that a translation may
put them in another order; figures come in as texts and are the same in every language. Only what a person reads goes
through here: JSON, files and their field names stay English (``english``).
"""

from __future__ import annotations

import contextlib
import gettext as catalogues
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

Message = TypeVar("Message", bound=str)

ENGLISH = "en"
VARIABLE = "QUERN_LANGUAGE"
_ASKING = (VARIABLE, "LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG")
FOLDER = Path(__file__).resolve().parents[2] / "locale"
"""Found by this file: in the environments of other tools there is no package to ask."""

_spoken: tuple[str, catalogues.NullTranslations] = (ENGLISH, catalogues.NullTranslations())


def gettext(message: str, /, **values: object) -> str:
    """``message`` in the language that is spoken, with ``values`` in its places in braces."""
    found = _spoken[1].gettext(message) if message else message
    return found.format(**values) if values else found


def ngettext(singular: str, plural: str, count: int, /, **values: object) -> str:
    """The one of two messages that goes with ``count``, which is one of the ``values`` too where it is to be read."""
    found = _spoken[1].ngettext(singular, plural, count)
    return found.format(**values) if values else found


def pgettext(context: str, message: str, /) -> str:
    """``gettext`` of a word that other languages have several of; ``context`` tells them apart."""
    return _spoken[1].pgettext(context, message)


def translatable(message: Message) -> Message:
    """``message`` as it is: a mark for the catalogue on what is translated later, by ``gettext`` where it is shown."""
    return message


def languages() -> list[str]:
    """The languages that there are: English, and one for each catalogue."""
    return [ENGLISH, *sorted(entry.name for entry in FOLDER.iterdir() if _catalogue(entry.name).is_file())]


def spoken() -> str:
    """The language that is spoken."""
    return _spoken[0]


def speak(language: str) -> None:
    """Speak ``language`` from here on: the code of a language, or of one of its variants, such as ``zh_CN``.

    Raises:
        UserError: There is no such language.
    """
    global _spoken
    known = languages()
    code = _code(language)
    if code not in known:
        from quern.core.errors import UserError  # whose messages are made by what stands here
        from quern.core.text.suggest import did_you_mean

        told = {"code": language, "known": ", ".join(known), "hint": did_you_mean(language, known)}
        raise UserError(gettext("no language is called {code!r}; there are {known}{hint}", **told))
    if code == ENGLISH:
        _spoken = (ENGLISH, catalogues.NullTranslations())
    elif code != _spoken[0]:
        with _catalogue(code).open("rb") as file:
            _spoken = (code, catalogues.GNUTranslations(file))


@contextlib.contextmanager
def speaking(language: str) -> Iterator[None]:
    """``speak``, for a while."""
    global _spoken
    before = _spoken
    speak(language)
    try:
        yield
    finally:
        _spoken = before


def english() -> contextlib.AbstractContextManager[None]:
    """English for a while: for what goes to files and programs."""
    return speaking(ENGLISH)


def of_environment(environment: Mapping[str, str]) -> str:
    """The language that quern's own variable or the locale asks for: the first known one of the first that is set.

    English where nothing is set, or nothing known.
    """
    asked = next(filter(None, map(environment.get, _ASKING)), "")
    known = languages()
    return next((code for code in map(_code, asked.split(":")) if code in known), ENGLISH)


def _code(locale: str) -> str:
    """``zh_CN.UTF-8`` -> ``zh``."""
    return re.split(r"[-_.@]", locale.strip(), maxsplit=1)[0].lower()


def _catalogue(language: str) -> Path:
    return FOLDER.joinpath(language, "LC_MESSAGES", "quern.mo")

"""Help and messages of the command line in the language of the user: ``--language``, the environment, the locale.

Options and verbs declare their help in English, when they are imported; it is translated where it is shown. Typer's own
texts go through the gettext of the standard library, so they are messages of the same catalogue.
"""

from __future__ import annotations

import contextlib
import gettext as catalogues
import os
import re
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from quern.core.text import language
from quern.core.text.language import gettext, translatable

EXAMPLE = "Example: "
"""What stands before the example that ends the help of a verb."""
DOMAIN = "quern"


def speak(code: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Speak the language on the command line, Typer's own texts included. Raises ``typer.BadParameter``."""
    try:
        language.speak(code)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--language") from None
    if language.spoken() == language.ENGLISH:
        catalogues.textdomain("messages")  # the usual one, which has no texts of Typer's
    else:
        catalogues.bindtextdomain(DOMAIN, str(language.FOLDER))
        catalogues.textdomain(DOMAIN)
        environment["LANGUAGE"] = language.spoken()  # by which that gettext finds the catalogue


def chosen(code: str | None) -> None:
    """What ``--language`` says, or its variable; without them the language stays that of the locale."""
    if code is not None:
        speak(code)


def language_first(arguments: Sequence[str]) -> list[str]:
    """The words with ``--language CODE`` in front, where it belongs, if it was given behind the verb."""
    words = list(arguments)
    for place, word in enumerate(words[: words.index("--") if "--" in words else None]):
        if word == "--language" or word.startswith("--language="):
            behind = place + (2 if word == "--language" else 1)
            return [*words[place:behind], *words[:place], *words[behind:]]
    return words


class Command(TyperCommand):
    """A verb whose help is shown in the language that is spoken."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _refusals_translated():
            return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _translate(self)
        super().format_help(ctx, formatter)


class Group(TyperGroup):
    """Verbs together; the outermost group finds out the language of the environment before it reads anything."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ctx.parent is None:
            speak(language.of_environment(os.environ))
        with _refusals_translated():
            return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for command in (self, *self.commands.values()):
            _translate(command)
        super().format_help(ctx, formatter)


@contextlib.contextmanager
def _refusals_translated() -> Iterator[None]:
    """What Typer says of words that it does not take: it is told in English, and known by how it is told."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message"):
            told = refusal(error.format_message())
            error.format_message = lambda: told
        raise


def refusal(text: str) -> str:
    """A refusal of Typer's in the language that is spoken, as it is where it is not among ``REFUSALS``."""
    for message in REFUSALS:
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+)", re.escape(message))
        if found := re.fullmatch(pattern, text, re.DOTALL):
            return gettext(message, **{name: refusal(part) for name, part in found.groupdict().items()})
    return text


def _translate(command: Any) -> None:
    """Of this process's own copy of ``command``: Typer makes one each time that it runs."""
    command.help = _translated(command.help)
    if (command.epilog or "").startswith(EXAMPLE):
        command.epilog = gettext("Example: {command}", command=command.epilog.removeprefix(EXAMPLE))
    for parameter in command.params:
        parameter.help = _translated(parameter.help)
        if isinstance(parameter.show_default, str):
            parameter.show_default = gettext(parameter.show_default)


def _translated(text: str | None) -> str | None:
    return None if text is None else gettext(text)


def help_texts(command: Any) -> Iterator[str]:
    """Every text of ``command`` and what is below it that ``_translate`` finds."""
    yield command.help
    for parameter in command.params:
        yield from (text for text in (parameter.help, parameter.show_default) if text and isinstance(text, str))
    for below in getattr(command, "commands", {}).values():
        yield from help_texts(below)


REFUSALS = (
    translatable("No such option: {name} (Possible options: {others})"),
    translatable("No such option: {name}"),
    translatable("Missing argument {name}."),
    translatable("Missing option {name}."),
    translatable("Option {name} requires an argument."),
    translatable("Got unexpected extra argument(s) ({words})"),
    translatable("Invalid value for {name}: {problem}"),
    translatable("Input should be a valid number, unable to parse string as a number"),
    translatable("Input should be a valid integer, unable to parse string as an integer"),
    translatable("Input should be greater than or equal to {least}"),
    translatable("Input should be less than or equal to {most}"),
    translatable("file {path} does not exist."),
)
"""What Typer says of words that it does not take, the more special first."""
OF_TYPER = (
    translatable("Show this message and exit."),
    translatable("Arguments"),
    translatable("Options"),
    translatable("Commands"),
    translatable("Error"),
    translatable("Aborted."),
    translatable("Missing command."),
    translatable("No such command {name!r}."),
    translatable("[default: {}]"),
    translatable("[env var: {}]"),
    translatable("[required]"),
    translatable("Try [blue]'{command_path} {help_option}'[/] for help."),
)
"""Messages of Typer that users see most."""

"""Options that several verbs share, and the reading of sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

import typer

from quern.cli.terminal.streams import kept_pipes
from quern.core.errors import UserError
from quern.core.machine.parallel import MOST_THREADS
from quern.core.recipe_parts import TEXT_AUTO
from quern.core.results import FORMER_SCENARIOS, Scenario, Target
from quern.core.text.language import gettext
from quern.core.text.suggest import did_you_mean
from quern.core.text.units import parse_size

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, a Hub id or a GGUF file.", show_default=False)
]
ArtifactPath = Annotated[
    str, typer.Argument(metavar="PATH", help="What `quern quantize` wrote, or any model folder.", show_default=False)
]
ResultsPath = Annotated[
    Path, typer.Argument(metavar="RESULTS.json", help="What `quern compare` wrote.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]
Calibration = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="TEXT",
        help="Text or records (JSON, CSV, Parquet) for the calibration statistics; one or several.",
        exists=True,
        dir_okay=False,
        callback=kept_pipes,
        show_default=False,
    ),
]
CalibrationTokens = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="Tokens to calibrate on; auto: as many as still lower the expected loss on held-out text.",
        show_default="the recipe's, usually 16384",
    ),
]
CalibrationTime = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        help="Such as 30min: find out in so much time how many tokens to calibrate on (as auto does).",
        show_default=False,
    ),
]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="Text or records (JSON, CSV, Parquet) to score; one or several.",
        exists=True,
        dir_okay=False,
        callback=kept_pipes,
        show_default=False,
    ),
]
Choices = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE.jsonl",
        help="Minimal pairs or multiple choice to score; one or several.",
        exists=True,
        dir_okay=False,
        callback=kept_pipes,
        show_default=False,
    ),
]
FormatOption = Annotated[
    list[str] | None,
    typer.Option(
        "--format-option",
        metavar="KEY=VALUE",
        help="A choice that the format has besides; several.",
        show_default=False,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Cap on resident memory, such as 16GiB.", show_default="none"),
]
EngineName = Annotated[
    str,
    typer.Option("--engine", metavar="NAME", help="What runs it: cpu, reference, or auto for the fastest that can."),
]
CacheName = Annotated[
    str | None,
    typer.Option(
        "--cache", metavar="DTYPE", help="Keys and values: float16, int8, int4 or float32.", show_default="float16"
    ),
]
Speculate = Annotated[
    str,
    typer.Option(
        "--speculate",
        metavar="HOW",
        help="Guess what follows: ngram, from what the text said before; none. Same answers.",
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="MODEL",
        help="Guess what follows by a small model of the same tokenizer.",
        show_default=False,
    ),
]
DraftTokens = Annotated[int, typer.Option("--draft-tokens", min=1, max=15, help="Guesses at a time, at most.")]
TopK = Annotated[int, typer.Option(min=0, help="Choose among the k likeliest tokens only; 0: all.")]
TopP = Annotated[
    float, typer.Option(min=0, max=1, help="Choose among the likeliest tokens that make up this probability.")
]
Temperature = Annotated[float, typer.Option(min=0, help="0: always the likeliest token; 1: as the model says.")]
Threads = Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="CPU threads.", show_default="all cores")]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Share the work with the machines of a Ray cluster: auto or HOST:PORT. Same bytes.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Same seed, same bytes.")]
Stream = Annotated[
    bool, typer.Option("--stream", help="Of a Hub model, fetch shards when they are needed, and delete them.")
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start over: discard unfinished work and replace what is in the output folder.")
]
OnUnhealthy = Annotated[
    Literal["stop", "repair", "warn"],
    typer.Option(help="Where a block is not fit for use: stop there, store that linear otherwise, or go on as it is."),
]
NoSpeed = Annotated[
    bool, typer.Option("--no-speed", help="Leave out the timed rounds: size, accuracy and memory are measured.")
]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens of text to score.")]


def scenario_named(name: str) -> Scenario:
    """The scenario called ``name``, by its former name too."""
    known = get_args(Scenario)
    if (today := FORMER_SCENARIOS.get(name, name)) not in known:
        raise typer.BadParameter(
            gettext(
                "no scenario is called {name!r}; there are {known}{hint}",
                name=name,
                known=", ".join(known),
                hint=did_you_mean(name, known),
            ),
            param_hint="--scenario",
        )
    return cast(Scenario, today)


def target_named(name: str) -> Target:
    """The runtime called ``name``."""
    known = get_args(Target)
    if name not in known:
        raise typer.BadParameter(
            gettext(
                "no runtime is called {name!r}; there are {known}{hint}",
                name=name,
                known=", ".join(known),
                hint=did_you_mean(name, known),
            ),
            param_hint="--for",
        )
    return cast(Target, name)


SCENARIOS = (
    "storage: many copies, little memory; speed: real-time translation, voice; overall: size, speed and loss alike"
)
ScenarioName = Annotated[Scenario, typer.Option(parser=scenario_named, metavar="NAME", help=f"{SCENARIOS}.")]

REPEATABLE = ("--calibration", "--text", "--choice")


def repeat_options(arguments: Sequence[str]) -> list[str]:
    """``--text a.txt b.txt`` spelled out as ``--text a.txt --text b.txt``, so that the shell's wildcards work.

    Only words that are files, and no .gguf, are taken for further values: MODEL may follow, and it is a folder, a Hub
    id or a .gguf file.
    """
    spelled: list[str] = []
    option, values = "", 0
    for word in arguments:
        if word.startswith("-"):
            option, values = word, 0
        elif option in REPEATABLE:
            if values and Path(word).is_file() and not word.lower().endswith(".gguf"):
                spelled.append(option)
            elif values:
                option = ""
            values += 1
        spelled.append(word)
    return spelled


def parse_weights(text: str | None) -> dict[str, float] | None:
    """``size=1,speed=2,loss=1`` as numbers by name; None where the option was not given. Raises ``UserError``."""
    if text is None:
        return None
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or name in found:
            raise UserError(
                gettext(
                    "--weights {text!r}: each of size, speed and loss once with a number: size=1,speed=2,loss=1",
                    text=text,
                )
            )
        found[name] = number
    return found


def names(text: str | None) -> tuple[str, ...] | None:
    """Words between commas; None where the option was not given."""
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def optional_size(text: str | None, option: str) -> int | None:
    """``parse_size``, or None where the option was not given."""
    return None if text is None else parse_size(text, option)


def calibration_tokens(text: str | None) -> int | Literal["auto"] | None:
    """What ``CalibrationTokens`` says."""
    if text is None or text == TEXT_AUTO:
        return cast(Literal["auto"] | None, text)
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(
            gettext(
                "--calibration-tokens is {text!r}; it must be a whole number from 1 on, or {text_auto}",
                text=text,
                text_auto=TEXT_AUTO,
            )
        )
    return number


_UNITS_OF_TIME = {"s": 1.0, "min": 60.0, "h": 3600.0}


def optional_seconds(text: str | None, option: str) -> float | None:
    """A duration such as ``90s``, ``30min`` or ``1.5h``; None where the option was not given."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(s|min|h)", text.strip())
    if found is None or not float(found[1]) > 0:
        raise UserError(
            gettext(
                "{option} is {text!r}; it must be a number with s, min or h behind it, such as 30min",
                option=option,
                text=text,
            )
        )
    return float(found[1]) * _UNITS_OF_TIME[found[2]]


def shared_over(ray: str | None, device: str = "cpu") -> AbstractContextManager[None]:
    """Inside, work goes to the cluster that ``--ray`` names, if it names one."""
    if ray is None:
        return nullcontext()
    if device != "cpu":
        raise UserError(
            gettext(
                "--ray shares out the work of processors, and --device is {device}; leave one of them out",
                device=device,
            )
        )
    from quern.quantization.ray_workers import ray_cluster

    return ray_cluster(ray)


def pairs(given: Sequence[str] | None, option: str) -> dict[str, str]:
    """What ``KEY=VALUE`` texts say. Raises ``UserError`` for one without ``=``, and for a key that comes twice."""
    found: dict[str, str] = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise UserError(gettext("{option} {text!r} is no KEY=VALUE", option=option, text=text))
        if key in found:
            raise UserError(gettext("{option} names {key!r} twice", option=option, key=key))
        found[key] = value
    return found

"""The options that say what a plan has to meet, as `quern plan` and `quern quantize` share them."""

from __future__ import annotations

from typing import Annotated

import typer

from quern.cli import options
from quern.core.allocation import Target
from quern.core.errors import UserError
from quern.core.recipe import Recipe, load_recipe
from quern.core.text.language import gettext

ALLOCATING = "auto"
"""The recipe that a target is set for where none is named."""

Bits = Annotated[
    float | None,
    typer.Option(metavar="BITS", help="Most bits per weight, everything included, such as 3.0.", show_default=False),
]
Fit = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Most memory for weights and key/value cache, such as 24GiB.", show_default=False
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="TOKENS", help="Length of the cache that --fit counts.", show_default="4096, or the model's"
    ),
]
MaxLoss = Annotated[
    float | None,
    typer.Option(metavar="KL", help="Largest predicted mean KL divergence, in nats a token.", show_default=False),
]
MinSpeed = Annotated[
    float | None,
    typer.Option(
        metavar="TOKENS/S", help="Least decoding speed, if weights are read at full bandwidth.", show_default=False
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        "--cache", metavar="DIR", help="Folder for the losses of candidates.", show_default="the user's cache folder"
    ),
]


def target_of(
    bits: float | None, fit: str | None, context: int | None, max_loss: float | None, min_speed: float | None
) -> Target | None:
    """The target that the options give; None where none was given. Raises ``UserError``."""
    memory = options.optional_size(fit, "--fit")
    if context is not None and memory is None:
        raise UserError(
            gettext("--context says how long the cache is that --fit counts; give --fit SIZE too, or leave it out")
        )
    for name, value in (("--bits", bits), ("--max-loss", max_loss), ("--min-speed", min_speed)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(gettext("{name} is {value:g}; it must be a number above 0", name=name, value=value))
    if bits is None and memory is None and max_loss is None and min_speed is None:
        return None
    return Target(bits=bits, memory=memory, context=context, max_loss=max_loss, min_speed=min_speed)


def recipe_for(name: str | None, target: Target | None, usual: str) -> Recipe:
    """The recipe called ``name`` for the ``target``, if there is one; None: ``usual``, or ``ALLOCATING`` for a target."""
    if target is None:
        return load_recipe(usual if name is None else name)
    return load_recipe(ALLOCATING if name is None else name).targeting(target)

"""A limit of what models in memory, and their keys and values, take together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quern.core.engine import CachingModel
from quern.core.errors import UserError, option
from quern.core.text.units import bytes_text, rounded_up
from quern.loading.fitting import open_model
from quern.serving.model import ServedModel


@dataclass
class MemoryLimit:
    """At most ``limit`` bytes for all models in memory: their weights, and room for keys and values of each.

    A model's room is that of ``parallel`` texts as long as its context, or what is left, but at least one such text.
    """

    limit: int
    paths: Mapping[str, str | Path]
    """Of the models, by name."""
    parallel: int
    _taken: dict[str, int] = field(default_factory=dict)

    @property
    def left(self) -> int:
        """Bytes that no model has."""
        return self.limit - sum(self._taken.values())

    def has_room(self, name: str) -> bool:
        """Whether the weights of a model fit what is left. Raises ``UserError`` for what is no model."""
        return self._weights(name) <= self.left

    def take(self, served: ServedModel) -> None:
        """Count a model that was loaded, and hold its keys and values to its room.

        Raises ``UserError`` where not even one text has room.
        """
        self.give_back(served.name)
        model = served.model
        weights = max(self._weights(served.name), model.bytes_per_token())
        text = served.context * model.cache_bytes_per_token if isinstance(model, CachingModel) else 0
        room = min(self.parallel * text, self.left - weights)
        if room < text or weights > self.left:
            least = bytes_text(rounded_up(self.limit - self.left + weights + text))
            enough = option(f"memory={least!r}", f"--memory {least.replace(' ', '')}")
            raise UserError(
                f"model {served.name!r} takes {bytes_text(weights)}, and a text of {served.context} tokens "
                f"{bytes_text(text)}; {bytes_text(max(0, self.left))} are left of {bytes_text(self.limit)}. Give at least "
                f"{enough}, or a smaller {option('context', '--context')}"
            )
        if isinstance(model, CachingModel):
            model.limit_cache(room)
        self._taken[served.name] = weights + room

    def give_back(self, name: str) -> None:
        """A model has gone."""
        self._taken.pop(name, None)

    def _weights(self, name: str) -> int:
        """Bytes of the files that hold the weights, which are mapped as they are."""
        return sum(file.stat().st_size for file in open_model(self.paths[name]).source.weight_files)

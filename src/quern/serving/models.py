"""Several models by name: loaded when they are first asked for, and let go again where memory is to be kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from quern.core.errors import UserError
from quern.serving.memory import MemoryLimit
from quern.serving.model import ServedModel


class Models:
    """Models that can be served. At most ``most`` are loaded, and as many as the ``memory`` holds; the one that was not used
    for longest goes first."""

    def __init__(
        self,
        loaders: Mapping[str, Callable[[], ServedModel]],
        most: int | None = None,
        memory: MemoryLimit | None = None,
    ) -> None:
        self._loaders, self._most, self._memory = dict(loaders), most or len(loaders), memory
        self._loaded: dict[str, ServedModel] = {}  # least recently used first
        self._loading = asyncio.Lock()

    def names(self) -> list[str]:
        """All names, the one that serves requests without a name first."""
        return list(self._loaders)

    def loaded(self) -> list[ServedModel]:
        """Those that are in memory."""
        return list(self._loaded.values())

    async def get(self, name: str) -> ServedModel:
        """The model called ``name``, loaded if need be. Raises ``UserError`` where it cannot be."""
        if (found := self._loaded.get(name)) is not None:
            self._loaded[name] = self._loaded.pop(name)
            return found
        async with self._loading:
            if name not in self._loaded:
                while len(self._loaded) >= self._most or (self._loaded and not self._has_room(name)):
                    await self._unload_oldest()
                model = await asyncio.to_thread(self._loaders[name])
                await self._take(model)
                model.start()
                self._loaded[name] = model
            return self._loaded[name]

    def _has_room(self, name: str) -> bool:
        return self._memory is None or self._memory.has_room(name)

    async def _take(self, model: ServedModel) -> None:
        """Give a model its room, if others have to go for it."""
        while self._memory is not None:
            try:
                self._memory.take(model)
                return
            except UserError:
                if not self._loaded:
                    raise
                await self._unload_oldest()

    async def _unload_oldest(self) -> None:
        name = next(iter(self._loaded))
        model = self._loaded[name]
        while model.scheduler.running or model.scheduler.waiting:  # it answers what it has begun
            await asyncio.sleep(0.05)
        await asyncio.to_thread(model.stop)
        del self._loaded[name]
        if self._memory is not None:
            self._memory.give_back(name)

    async def close(self) -> None:
        """End all."""
        for model in self.loaded():
            await asyncio.to_thread(model.stop)
        self._loaded.clear()

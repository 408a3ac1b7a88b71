"""Several models by name: loaded when they are first asked for, and let go again where memory is to be kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from quern.serving.model import ServedModel


class Models:
    """Models that can be served. At most ``most`` are loaded; the one that was not used for longest goes first."""

    def __init__(self, loaders: Mapping[str, Callable[[], ServedModel]], most: int | None = None) -> None:
        self._loaders, self._most = dict(loaders), most or len(loaders)
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
                while len(self._loaded) >= self._most:
                    await self._unload(next(iter(self._loaded)))
                model = await asyncio.to_thread(self._loaders[name])
                model.start()
                self._loaded[name] = model
            return self._loaded[name]

    async def _unload(self, name: str) -> None:
        model = self._loaded[name]
        while model.scheduler.running or model.scheduler.waiting:  # it answers what it has begun
            await asyncio.sleep(0.05)
        await asyncio.to_thread(model.stop)
        del self._loaded[name]

    async def close(self) -> None:
        """End all."""
        for model in self.loaded():
            await asyncio.to_thread(model.stop)
        self._loaded.clear()

"""Models under a limit of memory: who is let go, and how many keys and values the others may keep."""

import asyncio
from pathlib import Path

import pytest
from running_server import write_served_model

from quern.core.errors import UserError
from quern.serving.memory import MemoryLimit
from quern.serving.model import ServedModel
from quern.serving.models import Models

CONTEXT, PARALLEL = 64, 4


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return {name: str(write_served_model(tmp_path_factory.mktemp(name) / "model")) for name in ("one", "two", "three")}


def load(paths, name):
    return ServedModel(paths[name], name, threads=1, context=CONTEXT)


def sizes(paths):
    """Bytes of a model's weights, and of the keys and values of one text."""
    served = load(paths, "one")
    files = sum(file.stat().st_size for file in Path(paths["one"]).glob("*.safetensors"))
    return max(files, served.model.bytes_per_token()), CONTEXT * served.model.cache_bytes_per_token


def models(paths, limit):
    loaders = {name: lambda name=name: load(paths, name) for name in paths}
    memory = MemoryLimit(limit, paths, PARALLEL)
    return Models(loaders, memory=memory), memory


def loaded_after(paths, limit, asked):
    async def ask():
        known, memory = models(paths, limit)
        for name in asked:
            await known.get(name)
        names = [model.name for model in known.loaded()]
        most = {model.name: model.model.pool.most for model in known.loaded()}
        await known.close()
        return names, most, memory

    return asyncio.run(ask())


def test_as_many_as_fit_stay_and_the_oldest_goes_first(paths):
    weights, text = sizes(paths)
    whole = weights + PARALLEL * text
    assert loaded_after(paths, 3 * whole, ["one", "two", "three"])[0] == ["one", "two", "three"]
    names, most, memory = loaded_after(paths, 2 * whole, ["one", "two", "one", "three"])
    assert names == ["one", "three"]
    assert set(most.values()) == {PARALLEL * text}
    assert memory.left == 0


def test_a_model_has_what_is_left_but_room_for_one_text(paths):
    weights, text = sizes(paths)
    names, most, _ = loaded_after(paths, 2 * weights + (PARALLEL + 2) * text, ["one", "two"])
    assert (names, most["two"]) == (["one", "two"], 2 * text)
    names, _, _ = loaded_after(paths, 2 * weights + PARALLEL * text, ["one", "two"])
    assert names == ["two"]


def test_keys_and_values_stay_within_the_room(paths):
    weights, text = sizes(paths)

    async def fill():
        known, _ = models(paths, weights + text)
        served = await known.get("one")
        first, second = served.model.open(), served.model.open()
        served.model.step([(first, [1] * (CONTEXT - 16))])
        with pytest.raises(UserError, match="the limit of memory has room"):
            served.model.step([(second, [1] * 32)])
        await known.close()

    asyncio.run(fill())


def test_a_limit_below_the_least_says_so(paths):
    weights, text = sizes(paths)
    memory = MemoryLimit(weights + text - 1, paths, PARALLEL)
    with pytest.raises(UserError, match="Give at least memory="):
        memory.take(load(paths, "one"))
    MemoryLimit(weights + text, paths, PARALLEL).take(load(paths, "one"))

"""Running a GGUF file in this process through libllama, with the ctypes declarations that llama-cpp-python carries."""

from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quern.core.errors import UserError

if TYPE_CHECKING:
    import torch

BATCH = 512
"""Tokens of one call, at most: llama.cpp's own default of ``n_ubatch``."""
FLASH_ATTENTION = 0
"""Off. llama.cpp's own choice is on, which makes small models decode at half the speed behind 512 tokens on CPUs; a prompt
is read up to 1.4 times as fast with it."""
FIRST_CAPACITY = 1024
"""Tokens that a session's cache has room for at first; it grows by doubling, since it is allocated whole."""


def load_library(folder: Path) -> Any:
    """llama-cpp-python's declarations, bound to the libllama in ``folder``."""
    os.environ["LLAMA_CPP_LIB_PATH"] = str(folder)  # the package reads it when it is imported, and nothing else
    from llama_cpp import llama_cpp as api

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # else it prints every node of every graph
    api.llama_backend_init()
    return api


class _Context:
    """A ``llama_context`` with a cache for ``capacity`` tokens."""

    def __init__(self, api: Any, model: Any, *, capacity: int, threads: int, vocabulary_size: int) -> None:
        self.capacity = capacity
        self._api, self._vocabulary_size = api, vocabulary_size
        parameters = api.llama_context_default_params()
        parameters.n_ctx = capacity
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = FLASH_ATTENTION
        self._context = api.llama_init_from_model(model, parameters)
        if not self._context:
            raise MemoryError(f"llama.cpp could not make a context of {capacity} tokens")
        self._memory = api.llama_get_memory(self._context)
        self._batch = api.llama_batch_init(BATCH, 0, 1)
        view = np.ctypeslib.as_array
        self._tokens, self._positions = view(self._batch.token, (BATCH,)), view(self._batch.pos, (BATCH,))
        self._wanted = view(self._batch.logits, (BATCH,))
        view(self._batch.n_seq_id, (BATCH,))[:] = 1
        for slot in range(BATCH):
            self._batch.seq_id[slot][0] = 0

    def __del__(self) -> None:
        if getattr(self, "_context", None) and hasattr(self, "_batch"):
            self._api.llama_batch_free(self._batch)
            self._api.llama_free(self._context)

    def keep(self, length: int) -> bool:
        """Forget all but the first ``length`` tokens; False if this kind of model's memory cannot."""
        if length == 0:
            self._api.llama_memory_clear(self._memory, False)
            return True
        return bool(self._api.llama_memory_seq_rm(self._memory, 0, length, -1))

    def decode(self, ids: list[int], position: int, outputs: int) -> NDArray[np.float32]:
        """Append at most ``BATCH`` tokens at ``position``; logits float32 ``(outputs, vocabulary)`` of the last ones.

        The array is libllama's own and lives until the next call.
        """
        count = len(ids)
        self._batch.n_tokens = count
        self._tokens[:count] = ids
        self._positions[:count] = np.arange(position, position + count)
        self._wanted[: count - outputs] = 0
        self._wanted[count - outputs : count] = 1
        status = self._api.llama_decode(self._context, self._batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status} at token {position}")
        if outputs == 0:
            return np.empty((0, self._vocabulary_size), np.float32)
        logits = ctypes.cast(self._api.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(logits, (outputs, self._vocabulary_size))


class LlamaSession:
    """One sequence with libllama's key/value cache; see ``core.engine.Session``."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self._ids: list[int] = []
        self._context = model.borrow(FIRST_CAPACITY)
        self._context.keep(0)

    def __del__(self) -> None:
        if hasattr(self, "_context"):
            self._model.give_back(self._context)

    @property
    def length(self) -> int:
        """Tokens fed so far."""
        return len(self._ids)

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        if length == len(self._ids):
            return
        del self._ids[length:]
        if not self._context.keep(length):
            self._context.keep(0)
            self._append(self._ids, 0)

    def feed(self, ids: list[int]) -> torch.Tensor:
        """Append ``ids``; float32 logits ``(vocabulary,)`` of the last position."""
        import torch

        before = len(self._ids)
        self._ids += ids
        self._make_room(before)
        return torch.from_numpy(self._append(ids, before)[0].copy())

    def _make_room(self, before: int) -> None:
        needed, limit = len(self._ids), self._model.maximum_length
        if needed > limit:
            raise UserError(f"{needed} tokens do not fit: this model's context is {limit}")
        if needed <= self._context.capacity:
            return
        capacity = self._context.capacity
        while capacity < needed:
            capacity *= 2
        self._model.give_back(self._context)
        self._context = self._model.borrow(min(capacity, limit))
        self._context.keep(0)
        if before:
            self._append(self._ids[:before], 0)

    def _append(self, ids: list[int], position: int) -> NDArray[np.float32]:
        logits = np.empty((0, 0), np.float32)
        for start in range(0, len(ids), BATCH):
            piece = ids[start : start + BATCH]
            last = start + len(piece) == len(ids)
            logits = self._context.decode(piece, position + start, 1 if last else 0)
        return logits


class LlamaModel:
    """A GGUF file in libllama on the CPU; see ``core.engine.LoadedModel``.

    ``folder`` holds libllama. ``weight_bytes`` are the bytes of the tensors that one token reads.
    """

    def __init__(self, folder: Path, file: Path, threads: int, weight_bytes: int) -> None:
        self._api = load_library(folder)
        self._model = self._api.llama_model_load_from_file(str(file).encode(), self._api.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp could not load {file}")
        self.vocabulary_size = int(self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model)))
        self.maximum_length = int(self._api.llama_model_n_ctx_train(self._model))
        self._threads = threads
        self._weight_bytes = weight_bytes
        self._idle: list[_Context] = []
        self._scorer: _Context | None = None

    def bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads."""
        return self._weight_bytes

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits float32 ``(batch, time, vocabulary)`` for int64 ``(batch, time)``."""
        import torch

        batch, time = ids.shape
        if self._scorer is None or self._scorer.capacity < time:
            self._scorer = self._make(max(time, BATCH))
        found = np.empty((batch, time, self.vocabulary_size), np.float32)
        for row, sequence in zip(found, ids.tolist(), strict=True):
            self._scorer.keep(0)
            for start in range(0, time, BATCH):
                piece = sequence[start : start + BATCH]
                row[start : start + len(piece)] = self._scorer.decode(piece, start, len(piece))
        return torch.from_numpy(found)

    def start(self) -> LlamaSession:
        """An empty session."""
        return LlamaSession(self)

    def borrow(self, capacity: int) -> _Context:
        """A context for at least ``capacity`` tokens, or for the model's own length if that is less.

        A used one if there is one, as llama-bench does: the pages of a new one are touched in the first calls.
        """
        capacity = min(capacity, self.maximum_length)
        for place, context in enumerate(self._idle):
            if context.capacity >= capacity:
                return self._idle.pop(place)
        return self._make(capacity)

    def give_back(self, context: _Context) -> None:
        """The next session may have ``context``."""
        self._idle.append(context)

    def _make(self, capacity: int) -> _Context:
        return _Context(
            self._api,
            self._model,
            capacity=capacity,
            threads=self._threads,
            vocabulary_size=self.vocabulary_size,
        )

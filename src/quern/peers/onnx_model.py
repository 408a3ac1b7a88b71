"""Running a decoder in ONNX with onnxruntime's CPU provider, as onnxruntime-genai's model builder writes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quern.core.errors import UserError

if TYPE_CHECKING:
    import torch

FIRST_CAPACITY = 1024
"""Tokens that a session's cache has room for at first; it grows by doubling."""
_END = 2**31 - 1
_FIRST = "first"


class OnnxSession:
    """One sequence with its key/value buffers, which the attention operators extend in place.

    See ``core.engine.Session``. ``GroupQueryAttention`` writes into the past where past and present are one buffer, and
    takes the number of valid tokens from the attention mask: so going back needs no work.
    """

    def __init__(self, model: OnnxModel) -> None:
        self._model = model
        self._length = 0
        self._capacity = min(FIRST_CAPACITY, model.maximum_length)
        self._cache = model.empty_cache(self._capacity)

    @property
    def length(self) -> int:
        """Tokens fed so far."""
        return self._length

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self._length = length

    def feed(self, ids: list[int]) -> torch.Tensor:
        """Append ``ids``; float32 logits ``(vocabulary,)`` of the last position."""
        import torch

        return torch.from_numpy(self.run(np.array([ids], np.int64), first=-1)[0, -1])

    def run(self, ids: NDArray[np.int64], first: int) -> NDArray[np.float32]:
        """Append ``ids`` ``(1, time)``; logits ``(1, ..., vocabulary)`` of those from position ``first`` on."""
        needed = self._length + ids.shape[1]
        if needed > self._model.maximum_length:
            raise UserError(f"{needed} tokens do not fit: this model's context is {self._model.maximum_length}")
        if needed > self._capacity:
            self._grow(needed)
        logits = self._model.run(ids, self._length, self._cache, first)
        self._length = needed
        return logits

    def _grow(self, needed: int) -> None:
        while self._capacity < needed:
            self._capacity *= 2
        self._capacity = min(self._capacity, self._model.maximum_length)
        larger = self._model.empty_cache(self._capacity)
        for name, buffer in self._cache.items():
            larger[name][:, :, : self._length] = buffer[:, :, : self._length]
        self._cache = larger


class OnnxModel:
    """A decoder in onnxruntime on the CPU; see ``core.engine.LoadedModel``.

    ``file`` is the ``.onnx``. In memory the graph gets one input more, ``first``: from which position on the head computes
    logits, so that a prompt costs one row of them, as with the model builder's option ``prune_lm_head``.
    """

    def __init__(self, file: Path, threads: int, *, head_size: int, maximum_length: int) -> None:
        import onnx
        import onnxruntime

        proto = onnx.load(str(file), load_external_data=False)
        self._weight_bytes = _bytes_read(proto)
        _cut_before_head(proto)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
        serialized = proto.SerializeToString()
        self._session = onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
        inputs = {value.name: value for value in self._session.get_inputs()}
        self._takes_positions = "position_ids" in inputs
        self._heads = {name: value.shape[1] for name, value in inputs.items() if name.startswith("past_key_values.")}
        self._head_size = head_size
        (logits,) = [value for value in self._session.get_outputs() if value.name == "logits"]
        self.vocabulary_size = int(logits.shape[2])
        self.maximum_length = maximum_length

    def bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads."""
        return self._weight_bytes

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits float32 ``(batch, time, vocabulary)`` for int64 ``(batch, time)``."""
        import torch

        session = self.start()
        found = []
        for row in ids.numpy():
            session.rewind(0)
            found.append(session.run(row[None], first=0)[0])
        return torch.from_numpy(np.stack(found))

    def start(self) -> OnnxSession:
        """An empty session."""
        return OnnxSession(self)

    def empty_cache(self, capacity: int) -> dict[str, NDArray[np.float32]]:
        """Buffers float32 ``(1, heads, capacity, head size)`` by the names of the inputs they feed."""
        return {
            name: np.zeros((1, heads, capacity, self._head_size), np.float32) for name, heads in self._heads.items()
        }

    def run(
        self, ids: NDArray[np.int64], before: int, cache: dict[str, NDArray[np.float32]], first: int
    ) -> NDArray[np.float32]:
        """Logits of ``ids`` ``(1, time)`` from position ``first`` on; ``cache`` holds ``before`` tokens and is extended."""
        import onnxruntime

        time = ids.shape[1]
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((1, before + time), np.int64))
        binding.bind_cpu_input(_FIRST, np.array([first], np.int64))
        if self._takes_positions:
            binding.bind_cpu_input("position_ids", np.arange(before, before + time, dtype=np.int64)[None])
        for name, buffer in cache.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(buffer)
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), value)
        binding.bind_output("logits")
        self._session.run_with_iobinding(binding)
        logits: NDArray[np.float32] = binding.get_outputs()[-1].numpy()
        return logits


def _cut_before_head(proto: Any) -> None:
    """Add the input ``first`` and let the node that makes the logits see only the positions from there on."""
    from onnx import TensorProto, helper, numpy_helper

    graph = proto.graph
    makers = {output: node for node in graph.node for output in node.output}
    head = makers["logits"]
    while "MatMul" not in head.op_type:
        head = makers[head.input[0]]
    graph.input.append(helper.make_tensor_value_info(_FIRST, TensorProto.INT64, [1]))
    names = []
    for name, value in (("end", _END), ("axis", 1)):
        names.append(f"{_FIRST}/{name}")
        graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), names[-1]))
    hidden, seen = head.input[0], f"{_FIRST}/hidden"
    head.input[0] = seen
    place = list(graph.node).index(head)
    graph.node.insert(place, helper.make_node("Slice", [hidden, _FIRST, *names], [seen], name=f"{_FIRST}/Slice"))


def _bytes_read(proto: Any) -> int:
    """Bytes of the initializers, without those of which a token reads one row: an embedding that is not the head's too,
    and the tables of rotary positions."""
    users: dict[str, set[str]] = {}
    for node in proto.graph.node:
        for name in node.input:
            users.setdefault(name, set()).add(node.op_type)
    rows = {"Gather", "GroupQueryAttention", "RotaryEmbedding", "GatherBlockQuantized"}
    return sum(_stored_bytes(tensor) for tensor in proto.graph.initializer if not users.get(tensor.name, rows) <= rows)


def _stored_bytes(tensor: Any) -> int:
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    return len(tensor.raw_data)

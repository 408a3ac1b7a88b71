"""Running a decoder of OpenVINO's IR on the CPU, with the key/value cache inside the model (a *stateful* model)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quern.core.errors import UserError

if TYPE_CHECKING:
    import torch

_END = 2**31 - 1
_DECIDED = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")


class OpenVinoSession:
    """One sequence in an infer request of its own; see ``core.engine.Session``."""

    def __init__(self, model: OpenVinoModel) -> None:
        self._model = model
        self._ids: list[int] = []
        self._request = model.borrow()

    def __del__(self) -> None:
        if hasattr(self, "_request"):
            self._model.give_back(self._request)

    @property
    def length(self) -> int:
        """Tokens fed so far."""
        return len(self._ids)

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens: they are fed again, since the state cannot be cut."""
        if length == len(self._ids):
            return
        self._request.reset_state()
        kept, self._ids = self._ids[:length], []
        if kept:
            self.feed(kept)

    def feed(self, ids: list[int]) -> torch.Tensor:
        """Append ``ids``; float32 logits ``(vocabulary,)`` of the last position."""
        import torch

        before = len(self._ids)
        self._ids += ids
        if len(self._ids) > self._model.maximum_length:
            raise UserError(f"{len(self._ids)} tokens do not fit: this model's context is {self._model.maximum_length}")
        logits = self._model.infer(self._request, np.array([ids], np.int64), before, first=-1)
        return torch.from_numpy(logits[0, -1].copy())


class OpenVinoModel:
    """A stateful decoder in OpenVINO's CPU plugin; see ``core.engine.LoadedModel``.

    ``file`` is the IR's ``.xml``, as optimum-intel exports it: inputs ``input_ids``, ``attention_mask``, ``position_ids``
    and ``beam_idx``, output ``logits``. In memory it gets one input more, ``first``: from which position on the head
    computes logits. OpenVINO's own pipeline for language models likewise computes those of a prompt's last token only.
    """

    def __init__(self, file: Path, threads: int, maximum_length: int) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(file)
        _cut_before_head(model)
        self._weight_bytes = _bytes_read(model)
        self.vocabulary_size = int(model.output("logits").get_partial_shape()[2].get_length())
        self.maximum_length = maximum_length
        options = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": str(threads)}
        self._compiled = core.compile_model(model, "CPU", options)
        self._idle: list[Any] = []

    def choices(self) -> dict[str, str]:
        """What the CPU plugin decided for itself, for this model on this processor, by OpenVINO's names."""
        found = {name: self._compiled.get_property(name) for name in _DECIDED}
        return {
            name: value.get_type_name() if hasattr(value, "get_type_name") else str(value)
            for name, value in found.items()
        }

    def bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads."""
        return self._weight_bytes

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits float32 ``(batch, time, vocabulary)`` for int64 ``(batch, time)``."""
        import torch

        request = self.borrow()
        rows = [self._whole(request, row) for row in ids.numpy()]
        self.give_back(request)
        return torch.from_numpy(np.stack(rows))

    def start(self) -> OpenVinoSession:
        """An empty session."""
        return OpenVinoSession(self)

    def borrow(self) -> Any:
        """An infer request with an empty state."""
        request = self._idle.pop() if self._idle else self._compiled.create_infer_request()
        request.reset_state()
        return request

    def give_back(self, request: Any) -> None:
        """The next session may have ``request``."""
        self._idle.append(request)

    def infer(self, request: Any, ids: NDArray[np.int64], before: int, first: int) -> NDArray[np.float32]:
        """Logits ``(batch, time, vocabulary)`` of the positions from ``first`` on; they live until the next call.

        ``ids`` ``(batch, time)`` follow ``before`` tokens that the request's state holds.
        """
        batch, time = ids.shape
        request.infer(
            {
                "input_ids": ids,
                "attention_mask": np.ones((batch, before + time), np.int64),
                "position_ids": np.broadcast_to(np.arange(before, before + time), (batch, time)),
                "beam_idx": np.arange(batch, dtype=np.int32),
                "first": np.array([first], np.int64),
            },
            share_inputs=True,
        )
        logits: NDArray[np.float32] = request.get_tensor("logits").data
        return logits

    def _whole(self, request: Any, row: NDArray[np.int64]) -> NDArray[np.float32]:
        request.reset_state()
        logits: NDArray[np.float32] = self.infer(request, row[None], 0, first=0)[0].copy()
        return logits


def _cut_before_head(model: Any) -> None:
    """Add the input ``first`` and let the last matrix product see only the positions from there on."""
    import openvino
    from openvino import opset13

    head = model.output("logits").get_node()
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    first = opset13.parameter([1], dtype=np.int64, name="first")
    first.output(0).get_tensor().set_names({"first"})
    ends = [opset13.constant(np.array([value], np.int64)) for value in (_END, 1, 1)]
    seen = opset13.slice(head.input_value(0), first, *ends)
    head.input(0).replace_source_output(seen.output(0))
    model.add_parameters([first])
    model.validate_nodes_and_infer_types()
    assert isinstance(model, openvino.Model)


def _bytes_read(model: Any) -> int:
    """Bytes of the constants, without those of which a token reads one row: an embedding that is not the head's too."""
    constants = {
        op.get_friendly_name(): op.get_byte_size() for op in model.get_ops() if op.get_type_name() == "Constant"
    }
    rows: set[str] = set()
    for op in model.get_ops():
        if op.get_type_name() == "Gather":
            rows |= _only_for(op)
    return sum(size for name, size in constants.items() if name not in rows)


def _only_for(gather: Any) -> set[str]:
    """Names of the constants that feed ``gather``'s table and nothing else."""
    found: set[str] = set()
    waiting = [gather.input_value(0)]
    while waiting:
        output = waiting.pop()
        node = output.get_node()
        if len(output.get_target_inputs()) > 1:
            continue
        if node.get_type_name() == "Constant":
            found.add(node.get_friendly_name())
        waiting += [node.input_value(number) for number in range(node.get_input_size())]
    return found

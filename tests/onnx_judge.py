"""Stock ONNX Runtime on what quern writes: ``python onnx_judge.py QUERN REQUEST.json``, run in onnxruntime's environment.

``QUERN``: the folder of quern's package. The request has ``products``, models of one input ``x`` and one output that get the
rows of ``NAME.npy``, whose place what comes out takes, and ``folders``, token numbers ``ids`` (sequences of one length), a length
``prompt`` and ``generate``, which folders onnxruntime-genai is to run too. Beside each folder comes ``NAME.npz``: logits
float32 ``(sequences, time, vocabulary)`` as ``whole`` (all tokens at once, both sequences in a batch), ``steps`` (the prompt,
then token by token, past and present being tensors of their own) and ``shared`` (likewise, in one buffer that is extended in
place); ``operators``, their names; ``greedy``, onnxruntime-genai's own continuation of the first prompt.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

GREEDY = 8


def main(quern: str, request: str) -> None:
    package = types.ModuleType("quern")
    package.__path__ = [quern]
    sys.modules["quern"] = package
    import onnx
    import onnxruntime

    from quern.peers.onnx_model import OnnxModel

    asked = json.loads(Path(request).read_text("utf-8"))
    ids, prompt = np.array(asked["ids"], np.int64), asked["prompt"]
    for name in asked["products"]:
        session = onnxruntime.InferenceSession(name, providers=["CPUExecutionProvider"])
        np.save(f"{name}.npy", session.run(None, {"x": np.load(f"{name}.npy")})[0])
    for name in asked["folders"]:
        file = Path(name) / "model.onnx"
        onnx.checker.check_model(str(file))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        found = {"whole": run(session, ids, {})[0], "steps": stepwise(session, ids, prompt)}
        config = json.loads((Path(name) / "genai_config.json").read_text("utf-8"))["model"]
        size, length = config["decoder"]["head_size"], config["context_length"]
        model = OnnxModel(file, 1, head_size=size, maximum_length=length)
        found["shared"] = np.stack([buffered(model, row, prompt) for row in ids])
        proto = onnx.load(str(file), load_external_data=False)
        found["operators"] = np.array(sorted({node.op_type for node in proto.graph.node}))
        if name in asked["generate"]:
            found["greedy"] = np.array(generated(name, ids[0, :prompt].tolist()))
        np.savez(f"{name}.npz", **found)


def run(session: Any, ids: Any, past: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Logits of ``ids`` ``(batch, time)`` behind ``past``, and the past with them, by the names of inputs."""
    empty = {}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            empty[value.name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
    before = next(iter(past.values())).shape[2] if past else 0
    mask = np.ones((len(ids), before + ids.shape[1]), np.int64)
    positions = np.tile(np.arange(before, mask.shape[1], dtype=np.int64), (len(ids), 1))
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **(past or empty)}
    names = [value.name for value in session.get_outputs()]
    found = dict(zip(names, session.run(names, feed), strict=True))
    logits = found.pop("logits")
    return logits, {name.replace("present.", "past_key_values."): value for name, value in found.items()}


def stepwise(session: Any, ids: Any, prompt: int) -> Any:
    """Logits of all positions, those behind the prompt computed one by one."""
    logits, past = run(session, ids[:, :prompt], {})
    parts = [logits]
    for place in range(prompt, ids.shape[1]):
        logits, past = run(session, ids[:, place : place + 1], past)
        parts.append(logits)
    return np.concatenate(parts, axis=1)


def buffered(model: Any, row: Any, prompt: int) -> Any:
    """The same of one sequence, in the buffers of quern's adapter for ONNX Runtime."""
    session = model.start()
    parts = [session.run(row[None, :prompt], first=0)[0]]
    parts += [session.run(row[None, place : place + 1], first=0)[0] for place in range(prompt, len(row))]
    return np.concatenate(parts)


def generated(folder: str, prompt: list[int]) -> list[int]:
    """Greedy tokens behind ``prompt`` by onnxruntime-genai."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(folder)
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + GREEDY, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


if __name__ == "__main__":
    main(*sys.argv[1:])

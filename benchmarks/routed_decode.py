"""Decoding and prompts of a routed model beside llama.cpp: random weights of the shape of Qwen3-30B-A3B.

    python benchmarks/routed_decode.py [--layers 48] [--threads 2] [--rounds 7] [--recipes speed-int4 speed-trellis2-3]
        [--mixes q4_k_m iq2_xs] [--folder DIR]

Each of ``--recipes`` is an artifact of quern's in the cpu engine, each of ``--mixes`` a GGUF file with llama.cpp's types, in
both engines. With fewer ``--layers`` the blocks keep their true width; embedding and head then weigh more than they would.
llama.cpp is the one that ``quern peers install llama.cpp`` built. All contenders hold their files in processes of their own
and take turns; in every round each decodes ``--new`` tokens behind a short prompt and reads a prompt of ``--prompt``. Ratios
are of the first recipe to the first mix in llama.cpp, of the second to the second, and so on, medians over the rounds with
the middle half. ``share``: bytes of the weights that a token meets, over the seconds that it took, of what the same threads
read at best, measured before and after the rounds.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf_decode import Contender
from gguf_models import random_blocks
from measured import write_result
from native_matrices import spread

from quern.advisor.hardware import read_bandwidth
from quern.architectures.base import architecture_of
from quern.checkpoint.gguf.names import gguf_name
from quern.checkpoint.gguf.writing.container import TensorPlan, write_gguf
from quern.checkpoint.gguf.writing.metadata import model_metadata
from quern.codecs.base import codec_of
from quern.core.recipe import MIXES, load_recipe
from quern.engines.cpu import CpuEngine
from quern.formats._gguf_stacks import stored_shape
from quern.formats.mixes.base import scheme_of
from quern.peers.environment import Environment
from quern.pipeline.forecasting.random_artifact import write_random_artifact

HERE = Path(__file__).parent
BUFFER = 1 << 28
"""Bytes that the read bandwidth is measured with."""
SHAPE = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def write_random_gguf(path: Path, config: dict[str, Any], mix: str, seed: int = 0) -> Path:
    """A file whose matrices have the types of ``mix`` and random blocks; norms are ones, routers random."""
    architecture = architecture_of(config)
    types, shapes = MIXES.get(mix).types(architecture), architecture.module_shapes()
    tensors: dict[str, TensorPlan] = {}
    for name, shape in shapes.items():
        module, kind = name.removesuffix(".weight"), "F32"
        if module in types:
            rows, columns = shape
            form = codec_of(codec_of(scheme_of(types[module])).fitting((rows, columns))).ggml((rows, columns))
            if isinstance(form, str):
                raise SystemExit(form)
            kind = form.kind
        tensors[gguf_name(name)] = TensorPlan(gguf_name(name), stored_shape(architecture, name), kind)
    metadata = model_metadata(architecture.config.to_dict(), [0] * architecture.layers, path.stem).values
    written = {**metadata, "tokenizer.ggml.model": "none"}
    write_gguf(path, written, list(tensors.values()), _random(tensors.values(), np.random.default_rng(seed)))
    return path


def _random(tensors: Any, generator: np.random.Generator) -> Iterator[torch.Tensor]:
    for plan in tensors:
        if plan.kind == "F32":
            router = len(plan.shape) > 1
            yield (
                torch.from_numpy(generator.standard_normal(plan.shape, np.float32))
                if router
                else torch.ones(plan.shape)
            )
            continue
        *around, columns = plan.shape
        blocks = random_blocks(generator, math.prod(around), columns, GGMLQuantizationType[plan.kind])
        yield torch.from_numpy(blocks.reshape(*around, -1))


def contenders(options: argparse.Namespace, folder: Path) -> dict[str, tuple[str, Path]]:
    """By name: the engine and the model that it runs; models that are there are taken."""
    config, found = {**SHAPE, "num_hidden_layers": options.layers}, {}
    for recipe in options.recipes:
        path = folder / f"{options.layers}-{recipe}"
        if not (path / "config.json").is_file():
            write_random_artifact(path, config, load_recipe(HERE / "recipes" / f"{recipe}.yaml"))
        found[f"quern {recipe}"] = ("quern", path)
    for mix in options.mixes:
        path = folder / f"{options.layers}-{mix}.gguf"
        if not path.is_file():
            write_random_gguf(path, config, mix)
        for engine in ("quern", "llama.cpp"):
            found[f"{engine} {mix}"] = (engine, path)
    return found


def measure(options: argparse.Namespace, folder: Path, threads: int, environment: Environment) -> list[dict[str, Any]]:
    """All contenders in turns; the first round warms up."""
    models = contenders(options, folder)
    read = {name: CpuEngine().load(path, threads=1).bytes_per_token() for name, (_, path) in models.items()}
    running = {name: Contender(engine, path, threads, environment) for name, (engine, path) in models.items()}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in running}
    loads: list[float] = []
    bandwidth = [read_bandwidth([threads], BUFFER)[threads]]
    for number in range(options.rounds + 1):
        loads.append(os.getloadavg()[0])
        for name, contender in running.items():
            turn = contender.run(options.prompt, options.new)
            if number > 0:
                rounds[name].append(turn)
    bandwidth.append(read_bandwidth([threads], BUFFER)[threads])
    for contender in running.values():
        contender.close()
    rows = []
    for name, turns in rounds.items():
        row: dict[str, Any] = {"contender": name, "layers": options.layers, "threads": threads, "loads": loads}
        row |= {"prompt": options.prompt, "new": options.new, "rounds": options.rounds, "read_gb_s": bandwidth}
        row |= {
            "bytes_per_token": read[name],
            **{what: spread([t[what] for t in turns]) for what in ("decode", "prefill")},
        }
        row["share"] = row["decode"]["median"] * read[name] / (1e9 * max(bandwidth))
        rows.append(row)
        print(
            f"{name:24} {threads} threads  decode {row['decode']['median']:7.2f} tokens/s ({row['share']:.2f} of "
            f"{max(bandwidth):.1f} GB/s, {read[name] / 1e6:.0f} MB a token)  prefill {row['prefill']['median']:7.1f}",
            flush=True,
        )
    for recipe, mix in zip(options.recipes, options.mixes, strict=False):
        ours, theirs = rounds[f"quern {recipe}"], rounds[f"llama.cpp {mix}"]
        ratio = {
            what: spread([a[what] / b[what] for a, b in zip(ours, theirs, strict=True)])
            for what in ("decode", "prefill")
        }
        rows.append({"ratio": f"{recipe} / llama.cpp {mix}", "layers": options.layers, "threads": threads, **ratio})
        told = "  ".join(f"{what} x{values['median']:.2f}" for what, values in ratio.items())
        print(f"{recipe} as fast as llama.cpp's {mix}: {told}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--threads", nargs="+", type=int, default=[2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--recipes", nargs="+", default=["speed-int4", "speed-trellis2-3"])
    parser.add_argument("--mixes", nargs="+", default=["q4_k_m", "iq2_xs"])
    parser.add_argument("--folder", type=Path, help="Keeps the random models for another run.")
    parser.add_argument("--dry", action="store_true", help="write no result file")
    options = parser.parse_args()
    environment = Environment.of("llama.cpp")
    if (installed := environment.installed()) is None:
        raise SystemExit("llama.cpp is not installed; run: quern peers install llama.cpp")
    with tempfile.TemporaryDirectory(prefix="quern-routed-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [row for threads in options.threads for row in measure(options, folder, threads, environment)]
        content = {"llama_cpp": str(installed), "shape": SHAPE, "rows": rows}
        if not options.dry:
            print(write_result("routed_decode", content))


if __name__ == "__main__":
    main()

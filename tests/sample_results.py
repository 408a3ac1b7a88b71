"""A results file as a comparison of the bundled model would write it: seven rows, seeded, no model needed."""

from __future__ import annotations

import hashlib
import math
import random
from typing import Any

from quern.advisor.recommend import recommend
from quern.advisor.scoring import WEIGHTS
from quern.core.recipe import Recipe
from quern.core.recipe_parts import Rounding
from quern.core.results import (
    METRICS_VERSION,
    Failure,
    LayerError,
    Model,
    Protocol,
    Recommendation,
    Results,
    Row,
    Scenario,
    Spread,
    TextSource,
    Tool,
)
from quern.core.scheme import parse_scheme

LAYERS = 8
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
BF16_BYTES = 14_166_528
SCENARIOS: tuple[Scenario, ...] = tuple(WEIGHTS)
"""Those that bring their own weights."""


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_row(name: str, **changes: Any) -> Row:
    """A quantized row of half the size with every number measured; ``changes`` replace fields."""
    values: dict[str, Any] = {
        "name": name,
        "kind": "peer" if changes.get("tool") else "unquantized" if changes.get("recipe", name) is None else "quern",
        "recipe": {"name": name},
        "artifact_sha256": sha256(name),
        "bytes": 500,
        "bits_per_weight": 8.0,
        "compression": 1 - changes.get("bytes", 500) / 1000,
        "kl_mean": 0.01,
        "kl_ci95": None,
        "kl_noise_floor": 0.0004,
        "perplexity": 20.0,
        "top1_agreement": 0.95,
        "choice_accuracy": 0.8,
        "prefill_tokens_per_s": 1000.0,
        "decode_tokens_per_s": 100.0,
        "decode_limit_fraction": 0.5,
        "time_to_first_token_s": 0.1,
        "peak_rss_bytes": 10_000,
        "energy_joules_per_token": None,
        "quantize_seconds": 1.0,
    }
    return Row(**{**values, **changes})


def make_reference(**changes: Any) -> Row:
    """The unquantized model that belongs to ``make_row``."""
    values: dict[str, Any] = {
        "kind": "unquantized",
        "recipe": None,
        "artifact_sha256": None,
        "bytes": 1000,
        "compression": 0.0,
        "bits_per_weight": 16.0,
        "kl_mean": 0.0,
        "top1_agreement": 1.0,
        "quantize_seconds": None,
    }
    return make_row("reference", **{**values, **changes})


def _spread(median: float, chance: random.Random) -> Spread:
    return Spread(
        median=median,
        low=median * (1 - 0.04 * chance.random()),
        high=median * (1 + 0.04 * chance.random()),
        rounds=5,
    )


def _layers(bits: float, chance: random.Random) -> list[LayerError]:
    layers = []
    for depth in range(LAYERS):
        for linear in LINEARS:
            error = 0.6 * 4**-bits * (1 + 0.25 * depth) * math.exp(chance.gauss(0, 0.25))
            error *= {"mlp.down_proj": 3.0, "self_attn.o_proj": 1.8, "self_attn.k_proj": 0.6}.get(linear, 1.0)
            name = f"model.layers.{depth}.{linear}"
            layers.append(LayerError(linear=name, bits_per_weight=bits, relative_error=error))
    layers.append(LayerError(linear="model.embed_tokens", bits_per_weight=bits + 0.3, relative_error=0.3 * 4**-bits))
    return layers


def _measured(
    name: str,
    recipe: Recipe | None,
    *,
    bits: float,
    size: int,
    kl: float,
    perplexity: float,
    top1: float,
    choice: float,
    decode: float,
    prefill: float,
    seconds: float | None,
) -> Row:
    chance = random.Random(name)
    decode_spread, prefill_spread = _spread(decode, chance), _spread(prefill, chance)
    first = 128 / prefill + 1 / decode
    return Row(
        name=name,
        kind="quern" if recipe else "unquantized",
        recipe=recipe.to_json() if recipe else None,
        artifact_sha256=sha256(name) if recipe else None,
        bytes=size,
        bits_per_weight=bits,
        compression=1 - size / BF16_BYTES,
        kl_mean=kl,
        kl_ci95=(kl * 0.95, kl * 1.06),
        kl_noise_floor=0.00038,
        perplexity=perplexity,
        top1_agreement=top1,
        choice_accuracy=choice,
        choice_difference=choice - 0.846 if recipe else None,
        choice_difference_ci95=(choice - 0.858, choice - 0.834) if recipe else None,
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s=decode,
        decode_limit_fraction=size * decode / 22.4e9,
        prefill_limit_fraction=prefill * 2 * 7e6 / 380e9,
        time_to_first_token_s=first,
        speed_spread={
            "decode_tokens_per_s": decode_spread,
            "prefill_tokens_per_s": prefill_spread,
            "time_to_first_token_s": _spread(first, chance),
        },
        peak_rss_bytes=420_000_000 + 2 * size,
        energy_joules_per_token=None,
        quantize_seconds=seconds,
        layers=_layers(bits, chance) if recipe else [],
        notes=[] if recipe else ["bf16 checkpoint as it is; every loss is measured against it"],
    )


def _recipe(name: str, description: str, bits: int, rounding: str = "gptq", **weights: Any) -> Recipe:
    scheme = parse_scheme({"bits": bits, **weights})
    return Recipe(
        name=name, description=description, weights=scheme, embedding=scheme, rounding=Rounding(method=rounding)
    )


def sample_rows() -> list[Row]:
    """The rows of the sample comparison, reference first."""
    fast = {"granularity": "channel", "group_size": None}
    return [
        _measured("reference", None, bits=16.0, size=BF16_BYTES, kl=0.00038, perplexity=9.412, top1=0.998, choice=0.846,
                  decode=262.0, prefill=9120.0, seconds=None),
        _measured("fast", _recipe("fast", "8-bit weights and activations", 8, **fast), bits=8.12, size=7_196_204,
                  kl=0.0031, perplexity=9.437, top1=0.979, choice=0.845, decode=371.0, prefill=13_900.0, seconds=9.6),
        _measured("balanced", _recipe("balanced", "4-bit GPTQ, group 64", 4, group_size=64), bits=4.5, size=3_986_480,
                  kl=0.0284, perplexity=9.664, top1=0.938, choice=0.838, decode=418.0, prefill=8630.0, seconds=24.8),
        _measured("rtn4", _recipe("rtn4", "4-bit round to nearest", 4, "nearest", group_size=64), bits=4.5,
                  size=3_986_412, kl=0.0907, perplexity=10.236, top1=0.884, choice=0.824, decode=416.0, prefill=8655.0,
                  seconds=1.9),
        _measured("compact", _recipe("compact", "3-bit GPTQ, group 128", 3, group_size=128), bits=3.17, size=2_811_904,
                  kl=0.0942, perplexity=10.301, top1=0.881, choice=0.821, decode=447.0, prefill=8210.0, seconds=27.3),
        _measured("w8a16", _recipe("w8a16", "8-bit weights", 8, group_size=128), bits=8.25, size=7_308_112, kl=0.0009,
                  perplexity=9.418, top1=0.991, choice=0.846, decode=329.0, prefill=8870.0, seconds=8.7),
        _measured("tiny2", _recipe("tiny2", "2-bit GPTQ, group 64", 2, group_size=64), bits=2.5, size=2_226_900,
                  kl=0.811, perplexity=21.87, top1=0.552, choice=0.689, decode=463.0, prefill=8105.0, seconds=26.1),
    ]  # fmt: skip


def sample_results(scenario: Scenario = "overall", **constraints: Any) -> Results:
    """The sample comparison with its recommendation."""
    rows = sample_rows()
    return sample_with(rows, recommend(rows, scenario, **constraints))


def sample_with(rows: list[Row], recommendation: Recommendation) -> Results:
    """A results file around ``rows``."""
    return Results(
        metrics_version=METRICS_VERSION,
        created="2026-01-15T10:30:00+00:00",
        quern_version="0.1.0",
        model=Model(path="models/python-7m", sha256=sha256("model"), parameters=7_083_264, architecture="qwen2",
                    bf16_bytes=BF16_BYTES),
        hardware={
            "cpu_model": "AMD EPYC 9R14", "architecture": "x86_64", "usable_cores": 2,
            "instruction_sets": ["avx2", "avx512f", "avx512_vnni", "avx512_bf16"], "ram_bytes": 25_000_000_000,
            "ram_free_bytes": 19_400_000_000, "gpus": [], "load_average": [0.12, 0.3, 0.41],
            "measured": {
                "foreign_load": 0.02, "read_bandwidth_gb_s": {"1": 22.4, "2": 35.1},
                "gemm_gop_s": {"float32": {"1": 66.0, "2": 128.0}, "int8": None},
            },
        },
        versions={"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
        texts=[
            TextSource(name="held-out standard library", sha256=sha256("text"), tokens=32_768),
            TextSource(name="choice.jsonl", sha256=sha256("choice"), tokens=18_400),
        ],
        seed=0,
        rows=rows,
        recommendation=recommendation,
    )  # fmt: skip


def _tool(name: str, version: str, licence: str, runtime: str, *targets: str) -> Tool:
    return Tool(name=name, version=version, licence=licence, runtime=runtime, targets=list(targets),
                homepage=f"https://example.org/{name.lower()}")  # fmt: skip


LLAMA = _tool("llama.cpp", "0.3.36", "MIT", "llama.cpp", "llama.cpp")
GPTQMODEL = _tool(
    "GPTQModel", "7.6.0", "Apache-2.0", "transformers with GPTQModel's torch kernels", "transformers", "vllm"
)
AUTO_ROUND = _tool("AutoRound", "0.16.1", "Apache-2.0", "transformers with AutoRound's kernels", "transformers", "vllm")
HQQ = _tool("HQQ", "0.2.8", "Apache-2.0", "transformers with HQQ's torch kernels", "transformers", "vllm")
ONNX = _tool("ONNX Runtime", "1.31.1", "MIT", "onnxruntime", "onnxruntime")
OPENVINO = _tool("NNCF", "3.4.0", "Apache-2.0", "OpenVINO 2026.4.1", "openvino")
BITS = _tool("bitsandbytes", "0.50.2", "MIT", "transformers with bitsandbytes", "transformers", "vllm")
NOTE = "the embedding stayed in bf16"


def _other(
    name: str, tool: Tool, nominal: float, bits: float, kl: float, decode: float, seconds: float, **changes: Any
) -> Row:
    """A row of another tool, its lesser figures made up from these."""
    row = _measured(
        name, None, bits=bits, size=round(BF16_BYTES * bits / 16), kl=kl, perplexity=9.41 * math.exp(kl),
        top1=max(0.3, 1 - 0.35 * math.sqrt(kl)), choice=0.846 - 0.2 * kl, decode=decode, prefill=24 * decode,
        seconds=seconds,
    )  # fmt: skip
    variant = name.split("-", 1)[1]
    settings = {"bits": nominal, "group_size": 64}
    recipe = {"peer": tool.name.lower(), "name": variant, "bits": nominal, "settings": settings, "calibrated": False}
    update = {"kind": "peer", "recipe": recipe, "artifact_sha256": sha256(name), "tool": tool, "engine": "peer", "notes": [NOTE],
              "quantize_peak_rss_bytes": 900_000_000, "foreign_load": 0.03}  # fmt: skip
    return row.model_copy(update=update | changes)


def sample_tool_rows() -> list[Row]:
    """Twenty-one rows: those of the sample comparison and fourteen of seven other tools."""
    return [
        *sample_rows(),
        _other("llama.cpp-q8_0", LLAMA, 8, 8.5, 0.0011, 300.0, 2.1),
        _other("llama.cpp-q4_k_m", LLAMA, 4, 5.3, 0.031, 340.0, 14.0),
        _other("llama.cpp-iq3_s", LLAMA, 3, 4.1, 0.12, 190.0, 31.0),
        _other("gptqmodel-int4-g64-damp-0.05-descending-activation-order", GPTQMODEL, 4, 5.8, 0.041, 90.0, 95.0),
        _other("gptqmodel-int3-g64", GPTQMODEL, 3, 4.9, 0.19, 85.0, 96.0, foreign_load=0.62,
               notes=[NOTE, "timed while other programs kept 0.62 processors busy"]),
        _other("auto-round-int4-g64", AUTO_ROUND, 4, 5.8, 0.033, 110.0, 410.0),
        _other("auto-round-int2-g64", AUTO_ROUND, 2, 3.9, 0.62, 112.0, 420.0),
        _other("hqq-int4-g64", HQQ, 4, 5.9, 0.068, 75.0, 1.2),
        _other("hqq-int2-g64", HQQ, 2, 3.8, 2.9, 71.0, 1.3),
        _other("onnxruntime-int4-g32", ONNX, 4, 6.1, 0.077, 405.0, 3.4),
        _other("onnxruntime-int8", ONNX, 8, 9.4, 0.0019, 372.0, 3.1),
        _other("openvino-int8", OPENVINO, 8, 8.2, 0.0022, 365.0, 6.6),
        _other("openvino-int4-g64", OPENVINO, 4, 5.2, 0.058, 398.0, 8.8, prefill_tokens_per_s=None,
               decode_tokens_per_s=None, time_to_first_token_s=None, speed_spread=None, peak_rss_bytes=None),
        _other("bitsandbytes-nf4", BITS, 4, 5.9, 0.062, 21.0, 0.8),
    ]  # fmt: skip


def sample_tool_results(scenario: Scenario = "overall", *, quick: bool = False, **constraints: Any) -> Results:
    """A comparison with other tools, two of which failed."""
    rows = sample_tool_rows()
    protocol = Protocol(tokens=1024 if quick else 4096, prompt_tokens=512, decode_tokens=64, speed_rounds=3, threads=2,
                        quick=quick, interval_factor=2.0 if quick else 1.0)  # fmt: skip
    failures = [
        Failure(name="torchao-int4-g64", tool="torchao", stage="quantize",
                reason="ImportError: requires mslk >= 1.0.0 | which needs a GPU"),
        Failure(name="llm-compressor", tool="llm-compressor", stage="install", reason="pip found no matching version"),
    ]  # fmt: skip
    results = sample_with(rows, recommend(rows, scenario, **constraints))
    return results.model_copy(update={"protocol": protocol, "failures": failures})

"""What the journal of whole_72b.py amounts to, and the section of a page that says so, in English and in Chinese."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from quern.core.text.units import bytes_text, percent_text, seconds_text, significant

WEIGHTS, BLOCKS = "token weights", "quantizing blocks"


def summary(lines: Sequence[Mapping[str, Any]], layers: int, blocks: int) -> dict[str, Any]:
    """Figures of the steps that are done; those of the others are missing."""
    asked = {key: lines[0][key] for key in ("shape", "recipe", "blocks", "tokens", "compute_dtype")}
    times = {(line["task"], line["place"]): line["seconds"] for line in lines if line["step"] == "time"}
    steps = {
        "forward": [times[WEIGHTS, at] for at in range(blocks) if (WEIGHTS, at) in times],
        "backward": [times[WEIGHTS, at] for at in range(blocks + 1, 2 * blocks + 1) if (WEIGHTS, at) in times],
        "rounding": [times[BLOCKS, at] for at in range(blocks) if (BLOCKS, at) in times],
    }
    head = times.get((WEIGHTS, blocks))
    ends = [line for line in lines if line["step"] == "quantize ends"]
    peaks = [line["peak_rss_bytes"] for line in lines if line["step"] in ("time", "quantize ends")]
    runs = {line["memory"]: line["threads"] for line in lines if line["step"] == "quantize begins"}
    found: dict[str, Any] = {
        **asked, "layers": layers, "steps": steps, "head_seconds": head,
        "runs": sum(line["step"] == "quantize begins" for line in lines),
        "run_seconds": sum(line["seconds"] for line in ends), "memory": next(reversed(runs), None),
        "threads": next(reversed(runs.values()), None), "peak_rss_bytes": max(peaks, default=None),
        "quantized": any(line["finished"] for line in ends),
    }  # fmt: skip
    if all(steps.values()) and head is not None:
        each = sum(statistics.median(values) for values in steps.values())
        found |= {"block_seconds": each, "projected_seconds": layers * each + head}
    for step in ("repeat", "decode", "llama"):
        if done := [line for line in lines if line["step"] == step]:
            found[step] = {key: value for key, value in done[-1].items() if key not in ("step", "at")}
    if decode := found.get("decode"):
        token, read = statistics.median(decode["token_seconds"]), max(decode["read_gb_s"])
        decode["tokens_per_second"] = 1 / token
        decode["share_of_bandwidth"] = decode["bytes_per_token"] / token / (1e9 * read)
        further = max(0, decode["context"] - decode["fed"]) * decode["cache_bytes_per_token"]
        decode["peak_with_context_bytes"] = decode["peak_rss_bytes"] + further
    return found


def sections(result: Mapping[str, Any]) -> dict[str, str]:
    """By language."""
    cpu, cores = result["hardware"]["cpu_model"], result["hardware"]["usable_cores"]
    rows = rows_of(result)
    missing = [name for name in ("repeat", "decode", "llama") if name not in result]
    more = f" Not done yet: {', '.join(missing)}." if missing else ""
    more_zh = f"尚未执行的步骤：{'、'.join(missing)}。" if missing else ""
    english = [
        "## Measured",
        "",
        f"`{result['command']}`, {result['date']}, {cpu}, {cores} cores; `{result['recipe']['name']}`, {result['tokens']} "
        f"calibration tokens.{more}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {english} | {value} |" for english, _, value in rows),
    ]
    chinese = [
        "## 实测结果",
        "",
        f"`{result['command']}`，{result['date']}，{cpu}，{cores} 核；配方 `{result['recipe']['name']}`，{result['tokens']} "
        f"个校准词元。{more_zh}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {chinese} | {value} |" for _, chinese, value in rows),
    ]
    return {"en": "\n".join(english) + "\n", "zh": "\n".join(chinese) + "\n"}


def rows_of(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What the tables say: label in both languages, and a value that is the same in both."""
    names = {
        "forward": ("token weights, forward: seconds a block", "词元权重，前向：每块秒数"),
        "backward": ("token weights, backward: seconds a block", "词元权重，反向：每块秒数"),
        "rounding": ("passes, Hessians and rounding: seconds a block", "校准前向、Hessian 与舍入：每块秒数"),
    }
    true, layers = result["blocks"], result["layers"]
    rows = [("true blocks of the whole", "真实量化的块数 / 总块数", f"{true} / {layers}")]
    for key, (english, chinese) in names.items():
        if values := result["steps"][key]:
            spread = f" ({significant(min(values))} … {significant(max(values))})" if len(values) > 1 else ""
            rows.append((english, chinese, f"{significant(statistics.median(values))}{spread}, n = {len(values)}"))
    if result["peak_rss_bytes"] is not None:
        peak = f"{bytes_text(result['peak_rss_bytes'])} / {result['memory']}"
        rows.append(("peak memory while quantizing / cap", "量化时的峰值内存 / 上限", peak))
    if "projected_seconds" in result:
        whole = seconds_text(result["projected_seconds"])
        rows.append(("the whole, projected from these blocks", "由这些块推算的总时间", whole))
    if repeated := result.get("repeat"):
        size = f"{bytes_text(repeated['bytes'])} / {bytes_text(repeated['foretold_bytes'])}"
        rows.append(("artifact / foretold", "产物大小 / 预测值", size))
    if decode := result.get("decode"):
        rows += _decode_rows(decode)
    if llama := result.get("llama"):
        for name, rounds in llama["rounds"].items():
            decode, prefill = (statistics.median(one[kind] for one in rounds) for kind in ("decode", "prefill"))
            what = f"{significant(decode)} / {significant(prefill)}; {bytes_text(llama['bytes'][name])}"
            layers = llama["layers"]
            rows.append(
                (f"{name}, {layers} blocks: decode / prefill tokens/s; bytes",
                 f"{name}，{layers} 个块：解码 / 预填充 tokens/s；字节数", what)
            )  # fmt: skip
    return rows


def _decode_rows(decode: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    prefill = significant(decode["prefill_tokens"] / decode["prefill_seconds"])
    share = f"{percent_text(decode['share_of_bandwidth'])} / {significant(max(decode['read_gb_s']))} GB/s"
    peaks = f"{bytes_text(decode['peak_rss_bytes'])} / {bytes_text(decode['peak_with_context_bytes'])}"
    context = decode["context"]
    return [
        ("decode, tokens/s", "解码，tokens/s", significant(decode["tokens_per_second"])),
        ("of the read bandwidth / that", "占读带宽的比例 / 读带宽", share),
        (
            f"prefill of {decode['prefill_tokens']}, tokens/s",
            f"{decode['prefill_tokens']} 个词元的预填充，tokens/s",
            prefill,
        ),
        (
            f"peak resident memory / with {context} tokens of context (counted)",
            f"峰值常驻内存 / 含 {context} 个词元的上下文（推算）",
            peaks,
        ),
    ]

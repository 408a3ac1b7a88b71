"""Puts the table of a results.json between the markers of README.md and README.zh-CN.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from quern.advisor.scoring import Yardstick
from quern.cli.views.columns import comparison_columns, heading
from quern.core.errors import QuernError, UserError
from quern.core.results import Results, load_results
from quern.core.text.units import bytes_text, percent_text, signed, significant

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- demo-table:begin -->", "<!-- demo-table:end -->"


@dataclass(frozen=True)
class Language:
    """One README and its words for the table."""

    file: str
    headings: Mapping[str, str]
    """Words for the terminal's headings; those that are missing stay as they are."""
    caption: str
    recommendation: str
    reasons: Callable[[Results], str]
    to: str = " to "
    """Between the ends of an interval."""


def english_reasons(results: Results) -> str:
    """As the recommendation has them."""
    return " ".join(results.recommendation.reasons)


def chinese_reasons(results: Results) -> str:
    """The same figures: place, size, speed, loss and the score's rule."""
    advice = results.recommendation
    if not advice.ranking:
        return "没有结果满足要求。"
    best, *others = advice.ranking
    (row,) = [row for row in results.rows if row.name == best.name]
    yardstick = Yardstick.of(results.rows)
    text = f"{best.name} 得分最高（{signed(best.score)}）"
    if others:
        text += f"，其次是 {others[0].name}，相差 {significant(best.score - others[0].score, 2)}"
    text += f"。体积：{bytes_text(row.bytes)}，比 bf16 小 {percent_text(row.compression)}。"
    if row.decode_tokens_per_s is not None:
        text += f"速度：每秒解码 {significant(row.decode_tokens_per_s)} 个词元"
        if row.time_to_first_token_s is not None:
            text += f"，首个词元延迟 {1000 * row.time_to_first_token_s:.3g} 毫秒"
        if (gain := yardstick.speed_gain(row)) is not None:
            text += f"，是未量化模型的 {2**gain:.2f} 倍"
        text += "。"
    if row.kind != "unquantized" and row.kl_mean is not None:
        text += f"损失：每个词元的 KL 为 {significant(row.kl_mean)} 奈特"
        if row.kl_ci95 is not None:
            text += f"（95 % 区间 {significant(row.kl_ci95[0])} 至 {significant(row.kl_ci95[1])}）"
        if (ceiling := yardstick.loss_ceiling(row)) is not None:
            text += f"；同样大小的未量化模型会损失 {significant(ceiling)}"
        text += "。"
    weights = advice.weights or {}
    rule = ""
    for name, weight in weights.items():
        sign = " - " if name == "loss" else " + " if rule else ""
        rule += f"{sign}{Fraction(weight).limit_denominator(12)} × {CHINESE[name]}" if weight else ""
    return f"{text}得分 = {rule}。" if rule else text


CHINESE = {"size": "体积减半次数", "speed": "速度加倍次数", "loss": "损失同样多的未量化模型的减半次数"}
"""What each weight of a score counts."""


LANGUAGES = (
    Language(
        "README.md",
        {},
        "Measured by `make demo` on {cpu}, {cores} cores, with quern {version}. Quantized models ran on "
        "the cpu engine, `unquantized` in transformers; compare speeds with each other only.",
        "Recommended for the scenario *{scenario}*: **{choice}**. {reasons}",
        english_reasons,
    ),
    Language(
        "README.zh-CN.md",
        {
            "name": "名称",
            "size": "体积",
            "smaller by": "缩小",
            "bits/weight": "比特/权重",
            "KL divergence": "KL 散度",
            "95 % interval": "95 % 区间",
            "perplexity": "困惑度",
            "top-1": "首选一致",
            "choice": "选择题",
            "prefill tok/s": "预填充 词元/秒",
            "decode tok/s": "解码 词元/秒",
            "peak RAM": "峰值内存",
        },
        "由 `make demo` 在 {cpu}（{cores} 核）上用 quern {version} 测得。"
        "量化模型由 cpu 引擎运行，`unquantized` 由 transformers 运行；速度只宜互相比较。",
        "场景 *{scenario}* 的推荐：**{choice}**。{reasons}",
        chinese_reasons,
        " 至 ",
    ),
)


def table(results: Results, language: Language) -> str:
    """The markdown between the markers."""
    columns = comparison_columns()
    rows = [[language.headings.get(heading(column), heading(column)) for column in columns]]
    rows += [[column.cell(row).replace(" to ", language.to) for column in columns] for row in results.rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|---" + "|---:" * (len(columns) - 1) + "|")
    hardware, advice = results.hardware, results.recommendation
    caption = language.caption.format(
        cpu=hardware.get("cpu_model") or "an unnamed CPU", cores=hardware["usable_cores"], version=results.quern_version
    )
    recommendation = language.recommendation.format(
        scenario=advice.scenario, choice=advice.choice, reasons=language.reasons(results)
    )
    return "\n".join([*lines, "", recommendation, "", caption])


def replace_between_markers(text: str, new: str, name: str) -> str:
    """``text`` with ``new`` between the markers. Raises ``UserError`` unless each marker occurs once, in order."""
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in old + after or END in before + after:
        raise UserError(f"{name}: the markers {BEGIN} and {END} must occur once each, in this order; put them back")
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Update both files below ``root``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="what `make demo` wrote: demo/results.json")
    try:
        results = load_results(parser.parse_args(arguments).results)
        changed = {
            root / language.file: replace_between_markers(
                (root / language.file).read_text("utf-8"), table(results, language), language.file
            )
            for language in LANGUAGES
        }
    except QuernError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for path, text in changed.items():
        path.write_text(text, "utf-8")
        print(f"updated {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

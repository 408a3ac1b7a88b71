"""Puts the table of a results.json between the markers of README.md and README.zh-CN.md."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from quern.cli.columns import COLUMNS, heading
from quern.core.errors import QuernError, UserError
from quern.core.results import Results, load_results

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- demo-table:begin -->", "<!-- demo-table:end -->"


@dataclass(frozen=True)
class Language:
    """One README and its words for the table."""

    file: str
    headings: tuple[str, ...]
    caption: str
    recommendation: str


LANGUAGES = (
    Language(
        "README.md",
        tuple(heading(column) for column in COLUMNS),
        "Measured by `make demo` on {cpu}, {cores} cores, with quern {version}. Quantized models ran on "
        "the cpu engine, `unquantized` in transformers; compare speeds with each other only.",
        "Recommended for the scenario *{scenario}*: **{choice}**. {reasons}",
    ),
    Language(
        "README.zh-CN.md",
        (
            *("名称", "体积", "缩小", "比特/权重", "KL 散度", "95 % 区间", "困惑度"),
            *("首选一致", "选择题", "预填充 词元/秒", "解码 词元/秒", "峰值内存"),
        ),
        "由 `make demo` 在 {cpu}（{cores} 核）上用 quern {version} 测得。"
        "量化模型由 cpu 引擎运行，`unquantized` 由 transformers 运行；速度只宜互相比较。",
        "场景 *{scenario}* 的推荐：**{choice}**。",
    ),
)


def table(results: Results, language: Language) -> str:
    """The markdown between the markers."""
    rows = [language.headings, *([column.cell(row) for column in COLUMNS] for row in results.rows)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|---" + "|---:" * (len(language.headings) - 1) + "|")
    hardware, advice = results.hardware, results.recommendation
    caption = language.caption.format(
        cpu=hardware.get("cpu_model") or "an unnamed CPU", cores=hardware["usable_cores"], version=results.quern_version
    )
    recommendation = language.recommendation.format(
        scenario=advice.scenario, choice=advice.choice, reasons=" ".join(advice.reasons)
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

"""Draw docs/trellis.svg: how one lane's stream runs down a tile, and which bits make the window of a step.

python tools/draw_trellis.py
"""

from __future__ import annotations

from pathlib import Path

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "trellis.svg"
BITS, WINDOW, STEPS, SHOWN = 2, 7, 16, 5
CELL, TOP = 20, 92
INK, LINE, ONE, TWO = "#222", "#999", "#cfe3f7", "#f9dfb8"


def text(x: float, y: float, words: str, size: int = 12, anchor: str = "start") -> str:
    """A line of text."""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{INK}">{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str = "none") -> str:
    """A rectangle."""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="{LINE}"/>'


def tile(left: float) -> list[str]:
    """A block of 256 rows x 4 columns; the rows of one lane are filled."""
    parts = [text(left, 24, "a block: 256 rows x 4 columns", 13), text(left, 42, "64 lanes = 16 rows x 4 columns")]
    height = 11
    for step in range(6):
        y = TOP + step * (height * 4 + 4)
        for row in range(4):
            for column in range(4):
                chosen = row == 1 and column == 2
                parts.append(box(left + column * CELL, y + row * height, CELL, height, ONE if chosen else "none"))
        words = f"step {step}" if step < 5 else f"step {STEPS - 1}"
        parts.append(text(left + 4 * CELL + 8, y + 26, words))
    parts.append(text(left, TOP + 6 * 48 + 14, "(4 of 16 rows, 6 of 16 steps drawn)", 11))
    return parts


def stream(left: float) -> list[str]:
    """The circle of bits of one lane, cut open, and the windows of two steps."""
    parts = [text(left, 24, f"the stream of one lane: {BITS} bits a step, read around its end", 13)]
    count = BITS * 11
    names = [*range(STEPS - 4, STEPS), *range(7)]
    for bit in range(count):
        parts.append(box(left + bit * CELL, TOP, CELL, CELL))
    for index, step in enumerate(names):
        x = left + index * BITS * CELL
        parts.append(f'<line x1="{x}" y1="{TOP - 6}" x2="{x}" y2="{TOP + CELL}" stroke="{INK}"/>')
        parts.append(text(x + BITS * CELL / 2, TOP - 10, str(step), 12, "middle"))
    seam = left + 4 * BITS * CELL
    parts.append(
        f'<line x1="{seam}" y1="{TOP - 30}" x2="{seam}" y2="{TOP + 250}" stroke="#c33" stroke-dasharray="5 4"/>'
    )
    parts.append(text(seam + 6, TOP - 30, "the seam: bit 0", 12))
    parts.append(text(left, TOP - 30, "step", 12))
    for place, (step, colour) in enumerate(((0, ONE), (4, ONE), (3, TWO))):
        y, end = TOP + 50 + place * 62, BITS * (4 + step + 1)
        for bit in range(WINDOW):
            parts.append(box(left + (end - WINDOW + bit) * CELL, y, CELL, CELL, colour))
        words = (
            "window of step 0: its own two bits, highest, and five older ones",
            "window of step 4: picks an entry of the first table",
            "window of step 3: with two tables, step 4 adds this entry of the second",
        )[place]
        parts.append(text(left, y + CELL + 16, words))
    parts.append(
        text(
            left,
            TOP + 260,
            "weight = (table 0 [window of the step] + table 1 [window of the step before]) x scale of the row",
        )
    )
    return parts


def main() -> None:
    """Write the figure."""
    body = "\n".join([*tile(20), *stream(190)])
    size = 'viewBox="0 0 760 430" width="760" height="430"'
    OUTPUT.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n',
        "utf-8",
    )


if __name__ == "__main__":
    main()

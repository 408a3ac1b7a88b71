"""The picture of ``pareto.py``: an SVG written line by line; the same points give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Protocol

WIDTH, HEIGHT = 960, 600
LEFT, RIGHT, TOP, BOTTOM = 74, 20, 66, 56
LETTER, LINE = 5.9, 12
"""Width of a letter and height of a line, of names beside points."""
BLUE, ORANGE, INK, MUTED, FAINT = "#0a5ca8", "#b24a00", "#14181d", "#565f6b", "#dfe3e8"
MARKS = {
    "recipe": ("recipes of quern", BLUE),
    "plan": ("plans of quern's recipe auto", BLUE),
    "tool": ("other tools", ORANGE),
}
HALO = ' paint-order="stroke" stroke="#ffffff" stroke-width="3" stroke-linejoin="round"'
"""Of names, so that lines do not strike them through."""
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


class Shown(Protocol):
    """A point as far as it is drawn."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def kl(self) -> float: ...


class Scale:
    """From bytes and nats to places: bytes evenly, KL by its logarithm; the ends are round numbers around the points."""

    def __init__(self, points: Sequence[Shown]) -> None:
        sizes, losses = [point.bytes for point in points], [point.kl for point in points]
        self.step = _round_step((max(sizes) - min(sizes)) or max(sizes))
        self.first = math.floor(min(sizes) / self.step) * self.step
        self.last = max(math.ceil(max(sizes) / self.step) * self.step, self.first + self.step)
        self.low, self.high = math.log10(min(losses)) - 0.1, math.log10(max(losses)) + 0.1

    def x(self, size: float) -> float:
        """Where a size lies."""
        return LEFT + (size - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def y(self, kl: float) -> float:
        """Where a loss lies; less is lower."""
        return TOP + (self.high - math.log10(kl)) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def sizes(self) -> list[int]:
        """Ticks below."""
        return list(range(self.first, self.last + 1, self.step))

    def losses(self) -> list[float]:
        """Ticks at the left: 1, 2 and 5 of every power of ten."""
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        ticks = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
        return [tick for tick in ticks if self.low <= math.log10(tick) <= self.high]


def drawn(model: str, points: Sequence[Shown], fronts: Sequence[Sequence[Shown]], command: str) -> str:
    """The picture of ``points`` with ``fronts`` (quern's, then the others') as lines; ``command`` is how it was made."""
    if not points:
        raise ValueError("there is nothing to draw")
    scale = Scale(points)
    title = f"{model}: loss against bytes"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" '
        'role="img" aria-labelledby="title desc">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="desc">{escape(command)}</desc>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(LEFT, 26, title, size=17, weight=650),
        *_axes(scale),
        *(_line(scale, front, colour) for front, colour in zip(fronts, (BLUE, ORANGE), strict=True) if front),
        *(_mark(point.kind, scale.x(point.bytes), scale.y(point.kl), _told(point)) for point in points),
        *_names(scale, points, {id(point) for front in fronts for point in front}),
        *_legend({point.kind for point in points}),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _round_step(span: float) -> int:
    """The least of 1, 2 and 5 times a power of ten that a span has at most eight of."""
    power = 10 ** math.floor(math.log10(span / 8)) if span >= 8 else 1
    return int(next(power * digit for digit in (1, 2, 5, 10) if power * digit * 8 >= span))


def _axes(scale: Scale) -> list[str]:
    lines = []
    for tick in scale.losses():
        y = scale.y(tick)
        lines.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{FAINT}"/>')
        lines.append(_text(LEFT - 8, y + 4, f"{tick:g}", anchor="end", colour=MUTED))
    for size in scale.sizes():
        x = scale.x(size)
        lines.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="{FAINT}"/>')
        lines.append(_text(x, HEIGHT - BOTTOM + 18, f"{size / 1e6:g}", anchor="middle", colour=MUTED))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    lines.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, "bytes on disk (MB)", anchor="middle", size=13))
    turned = f' transform="rotate(-90 18 {middle:.1f})"'
    lines.append(_text(18, middle, "KL divergence (nats a token)", anchor="middle", size=13, more=turned))
    return lines


def _line(scale: Scale, front: Sequence[Shown], colour: str) -> str:
    """Steps: from a point on, all sizes up to the next one have its loss."""
    path = f"M{scale.x(front[0].bytes):.1f} {TOP}V{scale.y(front[0].kl):.1f}"
    path += "".join(f"H{scale.x(point.bytes):.1f}V{scale.y(point.kl):.1f}" for point in front[1:])
    dashes = ' stroke-dasharray="6 4"' if colour == ORANGE else ""
    return f'<path d="{path}H{WIDTH - RIGHT}" fill="none" stroke="{colour}" stroke-width="1.5" opacity=".7"{dashes}/>'


def _mark(kind: str, x: float, y: float, told: str = "") -> str:
    """A dot, a diamond or an open triangle around a place."""
    colour = MARKS[kind][1]
    title = f"<title>{escape(told)}</title>" if told else ""
    if kind == "recipe":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}">{title}</circle>'
    path = f"M{x:.1f} {y - 6:.1f}l5.5 6l-5.5 6l-5.5 -6z" if kind == "plan" else f"M{x:.1f} {y - 6:.1f}l5.6 10h-11.2z"
    fill = f'fill="{colour}"' if kind == "plan" else f'fill="#ffffff" stroke="{colour}" stroke-width="1.6"'
    return f'<path d="{path}" {fill}>{title}</path>'


def _told(point: Shown) -> str:
    return f"{point.name}: {point.bytes:,} bytes, KL {point.kl:.3g}"


def _names(scale: Scale, points: Sequence[Shown], first: set[int]) -> Iterable[str]:
    """Names beside the points where they cover nothing, those of ``first`` (by ``id``) before the others."""
    places = [(scale.x(point.bytes), scale.y(point.kl)) for point in points]
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    order = sorted(range(len(points)), key=lambda place: id(points[place]) not in first)
    for place in order:
        (x, y), width = places[place], LETTER * len(points[place].name)
        for left, base in _around(x, y, width):
            box = (left, base - LINE + 2, left + width, base + 2)
            inside = box[0] > LEFT and box[2] < WIDTH - 2 and box[1] > TOP and box[3] < HEIGHT - BOTTOM
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                colour = MARKS[points[place].kind][1]
                yield _text(left, base, points[place].name, colour=colour, size=11, more=HALO)
                break


def _around(x: float, y: float, width: float) -> list[tuple[float, float]]:
    """Left end and base line of a name around a point, the best place first: above the line that leads to the right."""
    beside = [(x + 9, y + 4), (x - 9 - width, y + 4)]
    near = [(x - 7 - width, y - 7), (x + 7, y + 15), (x - 7 - width, y + 15)]
    return [(x + 7, y - 5), *beside, *near, (x - width / 2, y + 19), (x - width / 2, y - 11)]


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _legend(kinds: set[str]) -> list[str]:
    lines, x = [], float(LEFT)
    for kind, (words, _) in MARKS.items():
        if kind in kinds:
            lines += [_mark(kind, x + 6, 46), _text(x + 18, 50, words)]
            x += 40 + 6.4 * len(words)
    lines.append(_text(x, 50, "lines: the least KL of so many bytes or fewer", colour=MUTED))
    return lines


def _text(
    x: float, y: float, words: str, *, anchor: str = "start", colour: str = INK, size: int = 12, weight: int = 400,
    more: str = "",
) -> str:  # fmt: skip
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}" font-weight="{weight}"'
        f"{more}>{escape(words)}</text>"
    )

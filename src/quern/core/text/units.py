"""Measured numbers as people read them (units chosen by size, three significant digits), and sizes as they write them."""

from __future__ import annotations

import re

from quern.core.errors import UserError
from quern.core.text.language import gettext, ngettext

_DECIMAL_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def significant(value: float, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits without an exponent: 1234 -> "1234", 0.01234 -> "0.0123"."""
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    if "e" not in text:
        return text
    return f"{float(text):.0f}" if abs(value) >= 1 else f"{float(text):.12f}".rstrip("0")


def bytes_text(count: float) -> str:
    """``count`` bytes in powers of 1000, as file managers and disk vendors count: 29000000000 -> "29 GB"."""
    scaled = float(count)
    for unit in _DECIMAL_UNITS:
        if abs(scaled) < 999.5 or unit == _DECIMAL_UNITS[-1]:
            break
        scaled /= 1000
    return f"{significant(scaled)} {unit}"


def processors_text(load: float) -> str:
    """``0.62 processors``, ``1 processor``: how many of them are kept busy."""
    number = significant(load, 2)
    return ngettext("{number} processor", "{number} processors", 1 if number == "1" else 2, number=number)


def rounded_up(count: int) -> int:
    """``count`` with all but its first three digits raised away: what ``bytes_text`` says of it is enough."""
    step: int = 10 ** max(len(str(count)) - 3, 0)
    return -(-count // step) * step


def seconds_text(seconds: float) -> str:
    """A duration: 0.0312 -> "31.2 ms", 95 -> "1 min 35 s", 4000 -> "1 h 6 min"."""
    if seconds < 1:
        return f"{significant(seconds * 1000)} ms"
    if seconds < 60:
        return f"{significant(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def percent_text(fraction: float) -> str:
    """``fraction`` of 1 in percent with one decimal: 0.804 -> "80.4 %"."""
    return f"{100 * fraction:.1f} %"


ABOVE_LIMIT = 1.05
"""Fraction of a probed limit above which the probe cannot have found the limit."""


def limit_text(fraction: float) -> str:
    """A fraction of a probed limit: 0.74 -> "74 % of limit"; well above 1 it is no share of anything."""
    if fraction <= ABOVE_LIMIT:
        return gettext("{share} % of limit", share=format(100 * fraction, ".0f"))
    return gettext("{factor} times the probed rate, which was no limit", factor=significant(fraction, 2))


def signed(value: float) -> str:
    """``value`` with its sign and two decimals, never "-0.00": 1.456 -> "+1.46"."""
    return f"{round(value, 2) + 0.0:+.2f}"


_UNITS = {"B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}IB": 1024**_power, f"{_letter}B": 1000**_power}

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str, option: str) -> int:
    """Bytes that ``text`` means: ``16GiB`` and ``16G`` are 16 x 1024^3, ``16GB`` is 16 x 1000^3.

    ``option`` names where the text came from in the ``UserError`` of one that is not a size above zero.
    """
    match = _SIZE.fullmatch(text)
    if match and not match[2] and float(match[1]) > 0:
        raise UserError(
            gettext(
                "{option} {text!r} has no unit; write {number}GiB (or {number}G), {number}MB or {number}B",
                option=option,
                text=text,
                number=match[1],
            )
        )
    factor = _UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * factor) if match and factor else 0
    if size <= 0:
        raise UserError(
            gettext(
                "{option} {text!r} is not a size; give a number above zero and a unit, such as 16GiB (or 16G), 24GB, 500M",
                option=option,
                text=text,
            )
        )
    return size

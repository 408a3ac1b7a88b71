"""WikiText's tokenized files as ordinary text: python benchmarks/plain_wikitext.py wiki.valid.tokens PLAIN.txt

The files separate punctuation by spaces, write ``@-@`` for a hyphen inside a word and ``<unk>`` for rare ones, mostly names,
which no text that a model meets does: calibrated on them it is not calibrated on its own language.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

JOINED = re.compile(r" @([-,.])@ ")
BEFORE = re.compile(r" ([.,;:!?)\]%]|'(?:s|t|re|ve|ll|d|m)\b|n't\b)")
AFTER = re.compile(r"([(\[]) ")


def plain(text: str) -> str:
    """Joined words, closing punctuation at its word; unknown words become a common name."""
    return AFTER.sub(r"\1", BEFORE.sub(r"\1", JOINED.sub(r"\1", text.replace("<unk>", "Smith"))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    options.target.write_text(plain(options.source.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()

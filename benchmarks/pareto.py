"""Loss against bytes: quern's recipes and plans beside other tools, as a picture and as a verdict.

    python benchmarks/pareto.py RESULTS.json [RESULTS.json ...] [--plans ALLOCATION.json ...] [-o docs/pareto.svg
        [--page docs/techniques.md]]

RESULTS are results files of ``quern compare`` (``tools.py`` writes them), ALLOCATION what ``allocation.py`` writes, of
which the allocated plans count as quern's. All have to be of one model and one text, measured by one version of the rules:
others are refused, with exit code 2. ``--same-kl 1 2`` names versions that docs/results.md says measure size and KL alike.

Draws the picture and writes the page's section about it. Prints a summary as JSON, and ends with exit code 1 where another
tool's row lies below quern's front: none of quern's rows has at most its bytes and at most its KL.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pages import write_section
from pareto_plot import drawn

from quern.core.errors import BadFileError, UserError
from quern.core.results import load_results

AGAIN = "Run benchmarks/allocation.py again with the same -o: what was measured is kept there"


@dataclass(frozen=True)
class Protocol:
    """What has to be equal for sizes and losses to stand beside each other."""

    model: str
    model_sha256: str
    texts: tuple[tuple[str, int], ...]
    """SHA-256 and scored tokens of each text."""
    metrics_version: int

    def difference(self, other: Protocol, same_kl: Sequence[int]) -> str | None:
        """What tells the two apart, as a clause; None where they go together. Versions in ``same_kl`` count as one."""
        if self.model == other.model and not other.model_sha256:
            return f"does not say on which checkpoint and text it was measured. {AGAIN}"
        if (self.model, self.model_sha256) != (other.model, other.model_sha256):
            return f"is of model {_of(other.model, other.model_sha256)}, not {_of(self.model, self.model_sha256)}"
        if self.texts != other.texts:
            return f"was measured on {_texts(other.texts)}, not on {_texts(self.texts)}"
        versions = {self.metrics_version, other.metrics_version}
        if len(versions) > 1 and not versions <= set(same_kl):
            return (
                f"has metrics version {other.metrics_version}, not {self.metrics_version}; if docs/results.md says that "
                f"both measure size and KL alike, pass --same-kl {' '.join(map(str, sorted(versions)))}"
            )
        return None


@dataclass(frozen=True)
class Point:
    """A row that has a size and a loss."""

    name: str
    kind: Literal["recipe", "plan", "tool"]
    tool: str
    bytes: int
    kl: float
    """Nats a token, above 0."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument("--plans", nargs="*", default=[], type=Path, metavar="ALLOCATION.json")
    parser.add_argument("--same-kl", nargs="*", default=[], type=int, metavar="VERSION")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.svg")
    parser.add_argument("--page", type=Path, metavar="PAGE.md")
    options = parser.parse_args(arguments)
    if options.page is not None and options.output is None:
        parser.error("a page shows the picture: name its file with -o")
    try:
        protocol, points, left_out = collected(options.results, options.plans, options.same_kl)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = {"model": protocol.model, **summary(points), "left_out": left_out}
    print(json.dumps(found, indent=2))
    if options.output is not None:
        fronts = [front(ours(points)), front(theirs(points))]
        options.output.write_text(drawn(protocol.model, points, fronts, _command(options)), "utf-8")
    if options.page is not None:
        picture = os.path.relpath(options.output.resolve(), options.page.resolve().parent)
        write_section(options.page, section(protocol, summary(points), Path(picture).as_posix(), _command(options)))
    return 1 if found["below_our_front"] else 0


def collected(
    results: Sequence[Path], plans: Sequence[Path], same_kl: Sequence[int] = ()
) -> tuple[Protocol, list[Point], list[str]]:
    """The protocol of the first file, all points, and the names of rows without a KL above 0, the unquantized ones apart.

    Raises ``BadFileError`` for what is no such file, and ``UserError`` for one of another protocol than the first.
    """
    read = [(path, *_of_results(path)) for path in results] + [(path, *_of_plans(path)) for path in plans]
    first_path, protocol, *_ = read[0]
    for path, other, *_ in read[1:]:
        if difference := protocol.difference(other, same_kl):
            raise UserError(f"only results of one protocol can be compared with {first_path}: {path} {difference}")
    return protocol, [one for *_, points, _ in read for one in points], [one for *_, left in read for one in left]


def ours(points: Iterable[Point]) -> list[Point]:
    """Quern's recipes and plans."""
    return [point for point in points if point.kind != "tool"]


def theirs(points: Iterable[Point]) -> list[Point]:
    """Other tools' rows."""
    return [point for point in points if point.kind == "tool"]


def front(points: Iterable[Point]) -> list[Point]:
    """Those that no other has as few bytes and as little KL as, by bytes."""
    found: list[Point] = []
    for point in sorted(points, key=lambda one: (one.bytes, one.kl)):
        if not found or point.kl < found[-1].kl:
            found.append(point)
    return found


def below(point: Point, others: Iterable[Point]) -> bool:
    """Whether none of ``others`` has at most the bytes and at most the KL of ``point``."""
    return not any(other.bytes <= point.bytes and other.kl <= point.kl for other in others)


def summary(points: Sequence[Point]) -> dict[str, Any]:
    """Numbers of points, both fronts, and other tools' rows below quern's, each with the best of no more bytes."""
    own, foreign = ours(points), theirs(points)
    found = []
    for point in foreign:
        if below(point, own):
            near = min((one for one in own if one.bytes <= point.bytes), key=lambda one: one.kl, default=None)
            found.append({**asdict(point), "ours_of_no_more_bytes": None if near is None else asdict(near)})
    return {
        "ours": len(own),
        "theirs": len(foreign),
        "our_front": [point.name for point in front(own)],
        "their_front": [point.name for point in front(foreign)],
        "below_our_front": found,
    }


def section(protocol: Protocol, found: Mapping[str, Any], picture: str, command: str) -> str:
    """The section of a page that shows ``picture`` and says what is seen."""
    lost = [one["name"] for one in found["below_our_front"]]
    seen = f"{len(lost) or 'none'} of {found['theirs']} rows of other tools below the line of quern's {found['ours']}"
    tokens = sum(count for _, count in protocol.texts)
    lines = [
        "## Loss against bytes",
        "",
        f"![Loss against bytes of the rows of {protocol.model}]({picture})",
        "",
        f"Model `{protocol.model}`, {tokens:,} tokens: {seen}{': ' if lost else ''}{', '.join(lost)}.",
        "Below it lies a row that takes fewer bytes than each of quern's that loses as little. Rows with all figures:",
        "[tools.md](tools.md). Made by",
        f"`{command}`.",
    ]
    return "\n".join(lines) + "\n"


def _of_results(path: Path) -> tuple[Protocol, list[Point], list[str]]:
    results = load_results(path)
    texts = tuple((text.sha256, text.tokens) for text in results.texts)
    protocol = Protocol(Path(results.model.path).name, results.model.sha256, texts, results.metrics_version)
    points, left_out = [], []
    for row in results.rows:
        if row.kind == "unquantized":
            continue
        if row.kl_mean is None or row.kl_mean <= 0:
            left_out.append(row.name)
        elif row.tool is None:
            points.append(Point(row.name, "recipe", "quern", row.bytes, row.kl_mean))
        else:
            points.append(Point(row.name, "tool", row.tool.name, row.bytes, row.kl_mean))
    return protocol, points, left_out


def _of_plans(path: Path) -> tuple[Protocol, list[Point], list[str]]:
    try:
        data = json.loads(path.read_text("utf-8"))
        plans = [(float(one["bits_per_weight"]), int(one["bytes"]), float(one["kl"])) for one in data["allocated"]]
        model = str(data["model"])
    except OSError as error:
        raise BadFileError(path, f"cannot be read: {error}", "Give what benchmarks/allocation.py wrote") from None
    except (KeyError, TypeError, ValueError) as error:
        raise BadFileError(path, f"is not what benchmarks/allocation.py writes: {error!r}", AGAIN) from None
    every = [Point(f"auto {bits:.2f} bits", "plan", "quern", size, kl) for bits, size, kl in plans]
    points, left_out = [point for point in every if point.kl > 0], [point.name for point in every if not point.kl > 0]
    try:
        texts = tuple((str(text["sha256"]), int(text["tokens"])) for text in data["texts"])
        protocol = Protocol(model, str(data["model_sha256"]), texts, int(data["metrics_version"]))
    except KeyError:  # of an earlier version, which did not say; another model's is told by its name
        protocol = Protocol(model, "", (), 0)
    return protocol, points, left_out


def _of(model: str, sha256: str) -> str:
    return f"{model} ({sha256[:12]})" if sha256 else f"{model} (whose hash it does not say)"


def _texts(texts: Iterable[tuple[str, int]]) -> str:
    return " and ".join(f"{tokens:,} tokens of text {sha256[:12]}" for sha256, tokens in texts) or "no text"


def _command(options: argparse.Namespace) -> str:
    """The command line that draws the same, from the root of the repository."""
    words = ["python benchmarks/pareto.py", *_named(options.results)]
    words += ["--plans", *_named(options.plans)] if options.plans else []
    words += ["--same-kl", *map(str, options.same_kl)] if options.same_kl else []
    return " ".join([*words, "-o", *_named([options.output])])


def _named(paths: Iterable[Path]) -> list[str]:
    root = Path(__file__).resolve().parents[1]
    return [
        str(path.resolve().relative_to(root)) if path.resolve().is_relative_to(root) else path.name for path in paths
    ]


if __name__ == "__main__":
    sys.exit(main())

"""benchmarks/pareto.py: which rows lie below a front, what goes together, and the picture."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sample_results import LLAMA, make_reference, make_row, sample_with

from quern.advisor.recommend import recommend
from quern.core.results import Results, Row

ROOT = Path(__file__).resolve().parents[3]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def pareto(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("pareto")


def own(name: str, size: int, kl: float | None) -> Row:
    return make_row(name, bytes=size, kl_mean=kl)


def tool(name: str, size: int, kl: float | None) -> Row:
    return make_row(name, bytes=size, kl_mean=kl, tool=LLAMA)


def results_of(*rows: Row, **changes: Any) -> Results:
    every = [make_reference(), *rows]
    return sample_with(every, recommend(every, "storage")).model_copy(update=changes)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes results into a file of its own."""

    def written(results: Results, name: str = "results.json") -> Path:
        path = tmp_path / name
        path.write_text(results.model_dump_json(), "utf-8")
        return path

    return written


def plans_of(results: Results, *plans: tuple[int, float], **changes: Any) -> str:
    data = {
        "model": Path(results.model.path).name,
        "model_sha256": results.model.sha256,
        "metrics_version": results.metrics_version,
        "texts": [text.model_dump(mode="json") for text in results.texts],
        "allocated": [{"bits_per_weight": 3.0, "bytes": size, "kl": kl} for size, kl in plans],
    }
    return json.dumps({**data, **changes})


@pytest.mark.parametrize(
    ("size", "kl", "lies_below"),
    [
        (300, 0.04, False),  # both worse than b
        (200, 0.03, False),  # b itself
        (200, 0.02, True),
        (199, 0.03, True),  # one byte less than b, and less KL than a
        (199, 0.05, True),  # a loses more, b is larger
        (199, 0.2, False),
        (150, 0.1, False),  # a's KL at more bytes
        (99, 5.0, True),  # nothing of ours is that small
    ],
)
def test_below_a_front_is_what_no_row_matches(pareto, size, kl, lies_below):
    ours = [pareto.Point("a", "recipe", "quern", 100, 0.1), pareto.Point("b", "recipe", "quern", 200, 0.03)]
    assert pareto.below(pareto.Point("x", "tool", "x", size, kl), ours) is lies_below


def test_front_has_the_rows_that_no_other_is_as_good_as(pareto):
    points = [
        pareto.Point(name, "tool", "x", size, kl)
        for name, size, kl in [
            ("c", 300, 0.02),
            ("a", 100, 0.1),
            ("dear", 250, 0.03),
            ("b", 200, 0.03),
            ("same", 100, 0.2),
        ]
    ]
    assert [point.name for point in pareto.front(points)] == ["a", "b", "c"]


def test_verdict_and_exit_code(pareto, write, capsys):
    results = results_of(own("a", 100, 0.1), tool("t", 120, 0.2), tool("u", 120, 0.05), tool("dead", 90, None))
    assert pareto.main([str(write(results))]) == 1
    found = json.loads(capsys.readouterr().out)
    (lower,) = found["below_our_front"]
    assert (lower["name"], lower["ours_of_no_more_bytes"]["name"]) == ("u", "a")
    assert (found["ours"], found["theirs"], found["left_out"]) == (1, 2, ["dead"])
    assert (found["our_front"], found["their_front"]) == (["a"], ["u"])
    assert pareto.main([str(write(results_of(own("a", 100, 0.04), tool("u", 120, 0.05))))]) == 0
    assert json.loads(capsys.readouterr().out)["below_our_front"] == []


def test_plans_count_as_ours(pareto, write, tmp_path, capsys):
    results = results_of(own("a", 100, 0.1), tool("u", 120, 0.05))
    plans = tmp_path / "allocation.json"
    plans.write_text(plans_of(results, (110, 0.04), (90, 0.3), (80, 0.0)), "utf-8")
    assert pareto.main([str(write(results))]) == 1
    capsys.readouterr()
    assert pareto.main([str(write(results)), "--plans", str(plans)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["our_front"] == ["auto 3.00 bits", "a", "auto 3.00 bits"]
    assert found["left_out"] == ["auto 3.00 bits"], "a loss of 0 has no logarithm"


def changed_text(results: Results, **changes: Any) -> dict[str, Any]:
    return {"texts": [results.texts[0].model_copy(update=changes), *results.texts[1:]]}


BASE = results_of(own("a", 100, 0.1), tool("t", 120, 0.2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": BASE.model.model_copy(update={"sha256": "f" * 64})},
            "is of model python-7m \\(ffffffffffff\\), not",
        ),
        ({"model": BASE.model.model_copy(update={"path": "x/other"})}, "is of model other .*, not python-7m"),
        (changed_text(BASE, sha256="e" * 64), "tokens of text eeeeeeeeeeee"),
        (changed_text(BASE, tokens=7), "was measured on 7 tokens of text"),
        ({"metrics_version": 1}, "has metrics version 1, not 2; .* --same-kl 1 2"),
    ],
    ids=["model", "model's name", "text", "tokens", "version"],
)
def test_another_protocol_is_refused(pareto, write, tmp_path, capsys, changes, message):
    first, second = write(BASE), write(BASE.model_copy(update=changes), "other.json")
    assert pareto.main([str(first), str(second), "-o", str(tmp_path / "x.svg")]) == 2
    shown = capsys.readouterr()
    assert re.search(message, shown.err)
    assert str(second) in shown.err
    assert shown.out == ""
    assert not (tmp_path / "x.svg").exists()


def test_versions_that_measure_alike_are_named_by_hand(pareto, write):
    both = [str(write(BASE)), str(write(BASE.model_copy(update={"metrics_version": 1}), "other.json"))]
    assert pareto.main([*both, "--same-kl", "1", "2"]) == 0
    assert pareto.main([*both, "--same-kl", "1", "3"]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (plans_of(BASE, (1, 0.1), model="smollm2", model_sha256="d" * 64), "is of model smollm2 .*, not python-7m"),
        (plans_of(BASE, (1, 0.1), metrics_version=1), "metrics version 1"),
        (plans_of(BASE, (1, 0.1), texts=[]), "on no text, not on"),
        ('{"model": "python-7m", "allocated": []}', "does not say on which checkpoint and text"),
        ('{"model": "smollm2", "allocated": []}', "is of model smollm2 .whose hash it does not say., not python-7m"),
        ("{}", "is not what benchmarks/allocation.py writes"),
        ("[", "is not what benchmarks/allocation.py writes"),
    ],
)
def test_plans_of_another_protocol_are_refused(pareto, write, tmp_path, capsys, text, message):
    plans = tmp_path / "allocation.json"
    plans.write_text(text, "utf-8")
    assert pareto.main([str(write(BASE)), "--plans", str(plans)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_plans_of_the_bundled_model_do_not_go_with_another_one(pareto, capsys):
    stored = ROOT / "benchmarks" / "results"
    (plans,) = stored.glob("allocation_python-7m_*.json")
    assert pareto.main([str(stored / "tools_smollm2_2026-11-22.json"), "--plans", str(plans)]) == 2
    assert "is of model python-7m" in capsys.readouterr().err


def test_missing_files_are_a_message(pareto, write, tmp_path, capsys):
    assert pareto.main([str(tmp_path / "no.json")]) == 2
    assert pareto.main([str(write(BASE)), "--plans", str(tmp_path / "no.json")]) == 2
    assert capsys.readouterr().err.count("cannot be read") == 2


def places(svg: str) -> dict[str, tuple[str, float, float]]:
    """By name: the shape's tag, and where it lies."""
    found = {}
    for shape in ET.fromstring(svg):
        title = shape.find(f"{SVG}title")
        if title is None:
            continue
        at = (
            (shape.get("cx"), shape.get("cy"))
            if shape.get("cx")
            else re.match(r"M([\d.]+) ([\d.]+)", shape.get("d")).groups()
        )
        found[title.text.partition(":")[0]] = (shape.tag.removeprefix(SVG), float(at[0]), float(at[1]))
    return found


def test_picture_has_every_point_where_it_belongs(pareto, write, tmp_path):
    results = results_of(
        own("small", 10**8, 0.5),
        own("large", 2 * 10**8, 0.01),
        tool("other<b>", 15 * 10**7, 0.1),
        tool("none", 9, None),
    )
    plans, picture = tmp_path / "allocation.json", tmp_path / "x.svg"
    plans.write_text(plans_of(results, (12 * 10**7, 0.05)), "utf-8")
    arguments = [str(write(results)), "--plans", str(plans), "-o", str(picture)]
    assert pareto.main(arguments) == 0
    text = picture.read_text("utf-8")
    found = places(text)
    assert set(found) == {"small", "large", "other<b>", "auto 3.00 bits"}
    assert [found[name][0] for name in ("small", "other<b>")] == ["circle", "path"]
    assert found["small"][1] < found["auto 3.00 bits"][1] < found["other<b>"][1] < found["large"][1]
    assert found["small"][2] < found["other<b>"][2] < found["large"][2], "less loss is further down"
    middle = (found["small"][1] + found["large"][1]) / 2
    assert found["other<b>"][1] == pytest.approx(middle, abs=0.2)
    assert "<b>" not in text
    again = tmp_path / "y.svg"
    assert pareto.main([*arguments[:-1], str(again)]) == 0
    assert again.read_text("utf-8").replace("y.svg", "x.svg") == text


def test_one_point_can_be_drawn(pareto, write, tmp_path):
    picture = tmp_path / "x.svg"
    assert pareto.main([str(write(results_of(own("a", 1000, 0.1)))), "-o", str(picture)]) == 0
    assert set(places(picture.read_text("utf-8"))) == {"a"}


def test_committed_picture_and_section_are_those_of_the_command_in_them(pareto, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    committed = ROOT / "docs" / "pareto.svg"
    command = ET.fromstring(committed.read_text("utf-8")).find(f"{SVG}desc").text
    _, script, *arguments, picture = shlex.split(command)
    assert (script, picture) == ("benchmarks/pareto.py", "docs/pareto.svg")
    page = ROOT / "docs" / "techniques.md"
    copy = tmp_path / "docs" / "techniques.md"
    copy.parent.mkdir()
    copy.write_text(page.read_text("utf-8"), "utf-8")
    drawn = copy.with_name("pareto.svg")
    pareto.main([*arguments, str(drawn), "--page", str(copy)])
    assert drawn.read_text("utf-8").replace("-o pareto.svg", "-o docs/pareto.svg") == committed.read_text("utf-8")
    assert copy.read_text("utf-8").replace("-o pareto.svg", "-o docs/pareto.svg") == page.read_text("utf-8")

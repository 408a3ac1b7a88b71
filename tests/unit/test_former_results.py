"""Files of earlier versions get the fields that rows have had since; today's files are taken at their word."""

import json
from pathlib import Path

import pytest
from sample_results import sample_tool_results

from quern.core.errors import BadFileError
from quern.core.results import Results, load_results

NOTE = "while it was timed, the unquantized model decoded at 1.16 of its speed in the first group"
STORED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("tools_*.json"))


def written(folder, change) -> Path:
    """A results file whose rows, as plain data, went through ``change``."""
    data = json.loads(sample_tool_results().model_dump_json())
    for row in data["rows"]:
        change(row)
    (folder / "results.json").write_text(json.dumps(data), "utf-8")
    return folder / "results.json"


def test_kind_follows_from_recipe_and_tool(tmp_path):
    expected = [row.kind for row in sample_tool_results().rows]
    assert set(expected) == {"unquantized", "quern", "peer"}
    found = load_results(written(tmp_path, lambda row: row.pop("kind")))
    assert [row.kind for row in found.rows] == expected
    assert found == sample_tool_results()


def test_group_speed_comes_from_the_note(tmp_path):
    def former(row):
        row.pop("group_speed")
        row["notes"] = [*row["notes"], NOTE] if row["name"] == "fast" else row["notes"]

    speeds = {row.name: row.group_speed for row in load_results(written(tmp_path, former)).rows}
    assert speeds.pop("fast") == 1.16
    assert set(speeds.values()) == {None}


def test_a_number_counts_more_than_a_note(tmp_path):
    rows = load_results(written(tmp_path, lambda row: row.update(group_speed=1.0, notes=[NOTE]))).rows
    assert {row.group_speed for row in rows} == {1.0}


@pytest.mark.parametrize("change", [{"kind": "peer"}, {"kind": "other"}], ids=["without a tool", "unknown"])
def test_a_kind_that_contradicts_the_row_is_refused(tmp_path, change):
    with pytest.raises(BadFileError, match="kind"):
        load_results(written(tmp_path, lambda row: row.update(change, tool=None)))


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_results_can_be_read(path):
    found = load_results(path)
    assert {"unquantized", "quern", "peer"} == {row.kind for row in found.rows}
    assert Results.model_validate_json(found.model_dump_json()) == found

"""Reading of sizes, and options with several values."""

import pytest

from quern.cli.options import (
    calibration_tokens,
    names,
    optional_seconds,
    optional_size,
    parse_size,
    parse_weights,
    repeat_options,
)
from quern.core.errors import UserError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GiB", 16 * 2**30),
        ("16gib", 16 * 2**30),
        ("16G", 16 * 2**30),
        ("24GB", 24 * 10**9),
        ("500M", 500 * 2**20),
        ("500 MB", 500 * 10**6),
        ("1.5KiB", 1536),
        (" 2TiB ", 2 * 2**40),
        ("123B", 123),
    ],
)
def test_sizes(text, size):
    assert parse_size(text, "--memory") == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "16XB", "-1GiB", "0", "0GiB", "0.1B", "1e9", "16GiB!", "nan", "1 6G", "1,5G"]
)
def test_what_is_no_size_is_refused_with_the_option_and_an_example(text):
    with pytest.raises(UserError, match=r"--memory .*16GiB"):
        parse_size(text, "--memory")


@pytest.mark.parametrize("text", ["16", "1.5", " 400000000 "])
def test_a_number_without_a_unit_is_asked_for_it(text):
    with pytest.raises(UserError, match=f"--max-size .* has no unit; write {text.strip()}GiB .*, {text.strip()}MB or"):
        parse_size(text, "--max-size")


def test_an_option_that_was_not_given():
    assert optional_size(None, "--memory") is None
    assert optional_size("1K", "--memory") == 1024


def test_weights():
    assert parse_weights("size=1,speed=2,loss=0.5") == {"size": 1, "speed": 2, "loss": 0.5}
    assert parse_weights(" size = 1 ") == {"size": 1}
    assert parse_weights(None) is None


@pytest.mark.parametrize(
    "text", ["", "size", "size=", "size=x", "size=nan", "size=inf", "size=1,size=2", "size=1,,loss=1"]
)
def test_what_are_no_weights_is_refused_with_the_option_and_an_example(text):
    with pytest.raises(UserError, match=r"--weights .*size=1,speed=2,loss=1"):
        parse_weights(text)


def test_names_between_commas():
    assert names(" MIT, Apache-2.0,") == ("MIT", "Apache-2.0")
    assert names("") == ()
    assert names(None) is None


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30min", 1800), ("1.5 h", 5400), (" 2min ", 120), (None, None)]
)
def test_durations(text, seconds):
    assert optional_seconds(text, "--calibration-time") == seconds


@pytest.mark.parametrize("text", ["", "30", "min", "-1min", "0s", "1d", "nan min", "1,5h", "1e3s"])
def test_what_is_no_duration_is_refused_with_the_option_and_an_example(text):
    with pytest.raises(UserError, match=r"--calibration-time is .*must be a number with s, min or h .*such as 30min"):
        optional_seconds(text, "--calibration-time")


def test_calibration_tokens():
    assert [calibration_tokens(text) for text in (None, "auto", "512")] == [None, "auto", 512]
    for text in ("0", "-1", "many", "1.5", "AUTO", ""):
        with pytest.raises(UserError, match="--calibration-tokens is .*a whole number from 1 on, or auto"):
            calibration_tokens(text)


def test_several_files_after_one_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "c.jsonl", "d.jsonl", "model.gguf"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    typed = "evaluate --text a.txt b.txt folder --choice c.jsonl d.jsonl --seed 1"
    meant = "evaluate --text a.txt --text b.txt folder --choice c.jsonl --choice d.jsonl --seed 1"
    assert repeat_options(typed.split()) == meant.split()


@pytest.mark.parametrize(
    "line",
    [
        "evaluate --text a.txt model.gguf",
        "evaluate --text a.txt organization/name",
        "evaluate --text a.txt folder b.txt",
        "evaluate --text missing.txt also-missing.txt",
        "evaluate model --text=a.txt b.txt",
        "report a.txt -o b.txt",
        "evaluate --text",
        "",
    ],
)
def test_other_words_stay_what_they_are(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "model.gguf"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    assert repeat_options(line.split()) == line.split()

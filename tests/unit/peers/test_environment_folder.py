"""The folder of a tool's environment: another one of that name is not touched."""

from __future__ import annotations

import pytest

from quern.core.progress import Silent
from quern.peers.environment import Environment, PeerError


def test_a_strangers_folder_is_neither_filled_nor_removed(tmp_path):
    environment = Environment.of("hqq", tmp_path)
    (tmp_path / "hqq" / "venv").mkdir(parents=True)
    (tmp_path / "hqq" / "venv" / "mine").write_text("mine")
    for attempt in (environment.remove, lambda: environment.install(Silent())):
        with pytest.raises(PeerError, match="hqq was not made by quern, so nothing in it is touched. Move it away"):
            attempt()
    assert (tmp_path / "hqq" / "venv" / "mine").read_text() == "mine"


def test_an_environment_that_was_begun_is_removed(tmp_path):
    environment = Environment.of("hqq", tmp_path)
    (tmp_path / "hqq" / "venv").mkdir(parents=True)
    (tmp_path / "hqq" / "constraints.txt").write_text("torch")
    assert environment.remove()
    assert not environment.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PeerError, match="could not be installed: .*Not a directory"):
        Environment.of("hqq", tmp_path / "file").install(Silent())
    (tmp_path / "hqq").write_text("mine")
    with pytest.raises(PeerError, match="was not made by quern"):
        Environment.of("hqq", tmp_path).install(Silent())

"""Another tool's new artifact in place of an old one: stopped anywhere, no artifact lies beside another's record."""

import json
import os

import pytest

from quern.pipeline.comparing import peers as module

OLD, NEW = {"artifact_sha256": "old"}, {"artifact_sha256": "new"}


@pytest.mark.parametrize("before", [False, True])
def test_stopped_before_any_step(tmp_path, monkeypatch, before):
    stopped = 0
    while True:
        folder = tmp_path / str(stopped)
        artifact, unfinished, record = folder / "row", folder / ".row.unfinished", folder / "row.json"
        unfinished.mkdir(parents=True)
        (unfinished / "weights").write_text("new")
        if before:
            artifact.mkdir()
            (artifact / "weights").write_text("old")
            record.write_text(json.dumps(OLD))
        real, left = os.replace, [stopped]

        def replace(source, target, real=real, left=left):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                module._replace(artifact, unfinished, record, NEW)
                done = True
            except KeyboardInterrupt:
                done = False
        if artifact.exists():
            said = json.loads(record.read_text())["artifact_sha256"]
            assert (artifact / "weights").read_text() == said
        if done:
            assert (artifact / "weights").read_text() == "new"
            assert {path.name for path in folder.iterdir()} == {"row", "row.json"}
            break
        stopped += 1
    assert stopped == 2 + before

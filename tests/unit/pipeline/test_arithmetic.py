"""A job that was begun with one arithmetic is not continued with another, and the reason is said."""

import json

import pytest
import torch
from artifacts import small_recipe

from quern import _native
from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.core.errors import UserError
from quern.pipeline import quantize as module
from quern.quantization.arithmetic import arithmetic


class StoppedError(Exception):
    pass


@pytest.fixture
def unfinished(tiny_model, tmp_path, monkeypatch):
    """Goes on with a job that was stopped after its first step."""

    def job():
        recipe = small_recipe(weights={"bits": 4, "granularity": "channel"})
        return module.quantize(tiny_model, tmp_path / "out", recipe=recipe, threads=1)

    def stop(_):
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(module, "start_chain", stop)
        with pytest.raises(StoppedError):
            job()
    return job


def test_what_it_is():
    found = arithmetic()
    assert found["torch"] == torch.__version__
    assert found["torch_instruction_set"] == torch.backends.cpu.get_cpu_capability()
    assert found["kernels_instruction_set"] == _native.isa()


@pytest.mark.parametrize("what", ["torch", "torch_instruction_set", "kernels_instruction_set"])
def test_going_on_elsewhere_is_refused_with_the_reason(what, unfinished, monkeypatch):
    here = arithmetic()
    with monkeypatch.context() as patch:
        patch.setattr(module, "arithmetic", lambda: {**here, what: "zap"})
        with pytest.raises(UserError, match="belongs to another job") as caught:
            unfinished()
    assert f'{what}: "{here[what]}" -> "zap"' in str(caught.value)
    assert caught.value.on_command_line.endswith("choose another output")
    report = unfinished()
    assert report.resumed, "where it was begun it goes on"


def test_a_finished_artifact_is_what_was_asked_for_wherever_it_was_made(unfinished, monkeypatch):
    unfinished()
    monkeypatch.setattr(module, "arithmetic", lambda: {"torch": "1.0"})
    assert unfinished().notes[0] == "was finished already"


def test_a_work_folder_of_a_version_that_did_not_say_is_refused(unfinished, tmp_path):
    place = tmp_path / "out.quern-work" / "fingerprint.json"
    known = json.loads(place.read_text())
    place.write_text(json.dumps({key: value for key, value in known.items() if key != "torch"}))
    with pytest.raises(UserError, match=r'torch: \(absent\) -> "'):
        unfinished()
    assert WorkFolder.open(place.parent, json.loads(place.read_text())).done("started") is not None

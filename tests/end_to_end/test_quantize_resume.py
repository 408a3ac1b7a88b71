"""A run that is killed continues, whenever it was killed, and ends with the bytes of one that was not."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from artifacts import INT8, hashes, small_recipe
from tiny_model import calibration_text, tiny_config, write_model

SERVER = Path(__file__).resolve().parents[1] / "quantize_server.py"
KILLS = 20
RECIPE = {
    "weights": {"bits": 4, "symmetric": False, "group_size": 32},
    "embedding": INT8,
    "rounding": {"method": "gptq", "target": "drift", "sweeps": 1, "two_sided": True},
    "transforms": [{"method": "awq"}],
    "calibration": {"tokens": 256, "sequence_length": 32, "token_weight": "fisher"},
}
STAGES = {
    "embedding and head": ("started", "weights checked", "outer"),
    "forward pass": ("inputs",),
    "backward pass": ("gradients", "weights"),
    "blocks": ("chain", "unquantized", "block"),
}
"""Which journal line comes last when a kill falls into a stage."""
IN_HAND = ("head", "gradients", "chain", "unquantized", "embedding")
"""Lines after which the stage that wrote them goes on: a kill there repeats them."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    config = tiny_config(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1)
    write_model(folder / "model", config)
    (folder / "text.txt").write_text(calibration_text()[:20_000], "utf-8")
    return folder


@pytest.fixture(scope="module")
def run(place):
    """Quantizes into a folder of ``place`` in a process of its own; see ``quantize_server.py``."""
    server = subprocess.Popen([sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == "ready\n"

    def ask(output: Path, threads: int = 2, **kill) -> dict:
        request = {
            "model": str(place / "model"), "output": str(output), "text": str(place / "text.txt"),
            "recipe": small_recipe(**RECIPE).to_json(), "threads": threads, **kill,
        }  # fmt: skip
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = json.loads(server.stdout.readline())
        assert answer["error"] is None, answer["error"]
        return answer

    yield ask
    server.stdin.close()
    server.wait(30)
    server.stdout.close()


@pytest.fixture(scope="module")
def whole(run, place) -> tuple[dict[str, str], list[str], float]:
    """Hashes, journal steps and seconds of a run that nobody disturbed."""
    answer = run(place / "whole")
    return hashes(place / "whole"), answer["steps"], answer["seconds"]


def stage(steps: list[str]) -> str:
    kind = steps[-1] if steps[-1] in STAGES["embedding and head"] else steps[-1].split(" ")[0]
    return next((name for name, kinds in STAGES.items() if kind in kinds), "publication")


def test_killed_at_random_moments_it_ends_with_the_same_bytes(run, place, whole):
    """Two kills for each artifact, the second in its continuation; then it is finished.

    A kill comes some random part of a step's time after a random line of the journal, each line once: so they fall into every
    stage, however fast the machine.
    """
    expected, steps, seconds = whole
    assert len(steps) >= KILLS  # and one more, which goes with the work folder and may not be seen
    random_ = random.Random(2)
    early, late = list(range(1, KILLS // 2 + 1)), list(range(KILLS // 2 + 1, KILLS + 1))
    random_.shuffle(early)
    random_.shuffle(late)
    met, killed = set(), 0
    for job, moments in enumerate(zip(early, late, strict=True)):
        output, before = place / f"out{job}", []
        for moment in moments:
            delay = (
                0 if moment <= 2 else random_.random() ** 2 * seconds / len(steps)
            )  # the first steps are the shortest
            # Every run writes "started" once more, and is to do something before it is killed.
            answer = run(output, lines=max(moment + bool(before), len(before) + 2) if before else moment, delay=delay)
            killed += answer["killed"]
            met.add(stage(answer["steps"]))
            assert not output.exists() or hashes(output) == expected, "nothing partial may look finished"
            assert answer["steps"][: len(before)] == before
            worked = [step for step in answer["steps"] if step != "started"]
            again = sorted({step for step in worked if worked.count(step) > 1})
            # A block leaves three lines, those of both streams' outputs and its own, the embedding leaves some too, and so does
            # the gradient at the head; between them they are still in hand.
            assert len(again) <= 2 * bool(before), again
            assert all(step.startswith(IN_HAND) for step in again), again
            before = answer["steps"]
        assert not run(output)["killed"]
        assert hashes(output) == expected
    assert killed >= KILLS - 2, "the last ones may come too late"
    assert met >= set(STAGES)
    names = {path.name for path in place.iterdir()}
    assert names == {"model", "text.txt", "whole", *(f"out{job}" for job in range(KILLS // 2))}, (
        "no work folder is left"
    )


@pytest.mark.parametrize("threads", [1, 3])
def test_neither_threads_nor_repetition_change_a_byte(threads, run, place, whole):
    run(place / f"threads{threads}", threads=threads)
    assert hashes(place / f"threads{threads}") == whole[0]


def test_threads_may_change_on_the_way(run, place, whole):
    assert run(place / "mixed", threads=1, lines=6, delay=0)["killed"]
    assert run(place / "mixed", threads=3, lines=16, delay=0)["killed"]
    run(place / "mixed", threads=2)
    assert hashes(place / "mixed") == whole[0]


def test_a_finished_run_is_not_repeated(run, place, whole):
    stamps = {path: path.stat().st_mtime_ns for path in (place / "whole").iterdir()}
    assert run(place / "whole")["steps"] == []
    assert {path: path.stat().st_mtime_ns for path in (place / "whole").iterdir()} == stamps

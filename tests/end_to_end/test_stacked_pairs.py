"""Every label of ``quern check --matrix`` is tried: what works or degrades is quantized and run, what is refused stops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from first_blocks import write_first_blocks

from quern.checkpoint.tokenizer import load_tokenizer
from quern.core.errors import UserError
from quern.core.recipe import parse_recipe
from quern.core.stacking import Part
from quern.engines.cpu import cache_named
from quern.evaluation.heldout import held_out_text
from quern.evaluation.texts import cut_windows
from quern.formats.base import runtimes_of
from quern.pipeline.stacking.answer import pairs, together
from quern.pipeline.stacking.parts import PLAIN
from quern.pipeline.stacking.trial import Trials, Use, tried
from quern.texts.source import Text

ELSEWHERE = {"vllm", "llama.cpp", "onnxruntime"}
"""Runtimes that need not be here."""
BLOCKS, TOKENS, WINDOW = 1, 1024, 128
LARGEST_CHANCE = 0.2
"""By how much a pair that works on the whole model may be worse than its bound on the first block."""
PAIRS = list(pairs())
ACCEPTED = [pair for pair in PAIRS if together(*pair).answer.label != "refuses"]
REFUSED = [pair for pair in PAIRS if together(*pair).answer.label == "refuses"]


def ordered(found: list[tuple[Part, Part]]) -> list[tuple[Part, Part]]:
    """Pairs of transforms, of which the recipe says the order, and of the others the first one."""
    return [(a, b) for a, b in found if a.kind == b.kind == "transform" or PAIRS.index((a, b)) < PAIRS.index((b, a))]


@pytest.fixture(scope="module", autouse=True)
def coarser_search() -> Iterator[None]:
    """AWQ tries fewer exponents, each of which rounds every weight; that there are more is not what is tried here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quern.quantization.transforms.awq.STEPS", 4)
        yield


@pytest.fixture(scope="module")
def trials(tmp_path_factory) -> Trials:
    model = write_first_blocks(tmp_path_factory.mktemp("stacking") / "model", BLOCKS)
    text = Text.of("held-out", [text for _, text in held_out_text()])
    scored = cut_windows([text], load_tokenizer(model), vocabulary_size=4096, tokens=TOKENS, window=WINDOW)
    return Trials(model, scored.windows, tmp_path_factory.mktemp("stacks"), tokens=TOKENS, sequence_length=WINDOW)


@pytest.mark.parametrize(("first", "second"), ordered(ACCEPTED), ids=str)
def test_a_pair_that_is_accepted_runs_and_loses_no_more_than_its_label_says(trials, first, second) -> None:
    """On one block chance is larger than on the whole model, where labels are measured (``trials()``)."""
    pair = together(first, second)
    found = tried(trials, pair)
    assert 0 < found.kl < 1
    if pair.answer.label == "works":
        assert found.change < LARGEST_CHANCE, f"KL {found.kl:.5f}, bound {found.bound:.5f}: {pair.answer.reason}"


@pytest.mark.parametrize(("first", "second"), ordered(REFUSED), ids=str)
def test_a_pair_that_is_refused_stops_before_work(trials, first, second) -> None:
    pair = together(first, second)
    if first.kind == second.kind == "format":
        with pytest.raises(UserError):
            parse_recipe({**PLAIN, "format": [first.name, second.name]}, "stack")
        return
    if first.kind == second.kind == "cache":
        with pytest.raises(UserError):
            cache_named(f"{first.name},{second.name}", "cpu")
        return
    made = set(trials.folder.iterdir())
    try:
        recipe = parse_recipe(trials.plain | pair.keys[2], "stack")
        trials.artifact(pair.keys[2])  # where a runtime refuses, the artifact is that of an accepted pair
    except UserError as error:
        assert pair.answer.reason.rpartition("; ")[2].partition(": ")[2] in str(error)
        assert set(trials.folder.iterdir()) == made
        return
    runtimes = {part.name for part in (first, second) if part.kind == "runtime"}
    if not runtimes & ELSEWHERE <= set(runtimes_of(recipe)):
        return  # they are not here; what they load is known from their sources (docs/compressed-tensors.md)
    if runtimes & {"llama.cpp", "onnxruntime"} and "cache" in (first.kind, second.kind):
        return  # caches are quern's: what stands in for those here has them
    others = [part for part in (first, second) if part.name not in ELSEWHERE]
    with pytest.raises(UserError):
        trials.loss(pair.keys[2], Use.of(*others))


def test_the_order_of_parts_of_different_kinds_makes_no_difference() -> None:
    for first, second in PAIRS:
        if first.kind != second.kind:
            assert together(first, second).answer.label == together(second, first).answer.label, (first, second)


def test_a_stack_that_cannot_be_read_by_transformers_is_not_read_by_it(trials) -> None:
    from transformers import AutoModelForCausalLM

    path: Path = trials.artifact({"storage": "entropy"})
    with pytest.raises(Exception, match="quern|entropy|safetensors|dtype|shape"):
        AutoModelForCausalLM.from_pretrained(path)

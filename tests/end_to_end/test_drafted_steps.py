"""Guesses that are read and taken back: what is left of a sequence is what one that never saw them has, bit for bit."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import tiny_config, write_model

from quern.core.errors import UserError
from quern.engines.cpu import CACHES, CpuEngine
from quern.engines.reference import load as load_reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("drafted"), tiny_config(max_position_embeddings=512))


def fresh(model, ids):
    sequence = model.open()
    try:
        return model.step([(sequence, list(ids))])[0]
    finally:
        sequence.close()


@pytest.mark.parametrize("cache", CACHES)
def test_sequences_that_lost_guesses_are_like_those_that_had_none(folder, cache):
    """Some of them share pages, grow by prompts and by tokens, end in any place of a page, and lose what they had before."""
    model, draw = CpuEngine().load(folder, cache=cache, threads=1), random.Random(7)
    texts = {model.open(): []}
    for _ in range(40):
        chosen = draw.sample(list(texts), draw.randint(1, min(3, len(texts))))
        steps = [[draw.randrange(256) for _ in range(draw.choice([1, 2, 5, 19, 40]))] for _ in chosen]
        drafted = [draw.randrange(len(tokens)) for tokens in steps]
        rows = model.step(list(zip(chosen, steps, strict=True)), drafted).split([1 + count for count in drafted])
        for sequence, tokens, count, found in zip(chosen, steps, drafted, rows, strict=True):
            right = draw.randint(0, count)
            for place in (0, right, count):
                read = texts[sequence] + tokens[: len(tokens) - count + place]
                assert torch.equal(found[place], fresh(model, read))
            texts[sequence] = texts[sequence] + tokens[: len(tokens) - count + right]
            sequence.rewind(len(texts[sequence]))
            assert sequence.length == len(texts[sequence])
        sequence = draw.choice(list(texts))
        if len(texts) < 5:
            made = sequence.fork(draw.randint(0, sequence.length))
            texts[made] = texts[sequence][: made.length]
        elif draw.random() < 0.5:
            sequence.rewind(draw.randint(0, sequence.length))  # also below what others share with it
            texts[sequence] = texts[sequence][: sequence.length]
        if sequence.length > 250:
            sequence.close()
            del texts[sequence]
            texts[model.open()] = []
    pages = model.pool._pages
    for sequence in texts:
        sequence.close()
    assert pages.free_pages == pages.pages


def test_the_reference_engine_reads_guesses_too(folder):
    model = load_reference(folder, dtype="float32")
    ids = list(range(40))
    first, second = model.open(), model.open()
    rows = model.step([(first, ids[:30]), (second, ids[:20])], [4, 0])
    whole = model.logits(torch.tensor([ids]))[0]
    assert rows.shape == (6, 300)
    assert torch.allclose(rows, torch.cat([whole[25:30], whole[19:20]]), atol=1e-4 * float(whole.abs().max()))
    first.rewind(27)
    assert torch.allclose(model.step([(first, ids[27:])])[0], whole[-1], atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("drafted", [[1], [-1, 0], [3, 0], [0]])
def test_steps_with_wrong_counts_of_guesses_are_refused(folder, drafted):
    model = CpuEngine().load(folder, threads=1)
    first, second = model.open(), model.open()
    for one in (model, load_reference(folder)):
        with pytest.raises(UserError, match="guesses"):
            one.step([(first, [1, 2, 3]), (second, [4])], drafted)
    assert first.length == second.length == 0


def test_rows_of_texts_that_are_read_in_several_parts(tmp_path):
    """The decoder takes 512 tokens at a time."""
    folder = write_model(tmp_path / "model", tiny_config(max_position_embeddings=1200), tokenizer=False)
    model, ids = CpuEngine().load(folder, threads=1), [token % 250 for token in range(1100)]
    first, second, third = model.open(), model.open(), model.open()
    states = model.hidden_states([(first, ids), (second, ids[:3])])
    assert torch.equal(
        states[:1100], torch.cat([model.hidden_states([(third, ids[at : at + 300])]) for at in range(0, 1100, 300)])
    )
    assert torch.equal(states[1100:], states[:3])
    first.rewind(0)
    assert torch.equal(model.step([(first, ids)], [700]), model.logits(torch.tensor([ids]))[0, 399:])
    for wanted in ([2], [-1], [1, 1], []):
        with pytest.raises(ValueError, match="wanted|two counts"):
            model._decoder.read([first.cache], [1], np.array([1], np.int32), wanted)


LARGE = 200


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A model in which the values of one token are more than float16 can hold."""
    folder = write_model(tmp_path_factory.mktemp("overflowing"), tiny_config(torch_dtype="float32"))
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    embedding[:, 0], embedding[LARGE] = 0, 0
    embedding[LARGE, 0] = 1
    weights["model.layers.0.self_attn.v_proj.weight"][:, 0] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("cache", [None, "float16"])
def test_a_guess_that_float16_cannot_hold_is_no_reason_to_widen(overflowing, cache):
    model = CpuEngine().load(overflowing, cache=cache, threads=1)
    plain, drafted = model.open(), model.open()
    expected = model.step([(plain, [1, 2, 3])])
    found = model.step([(drafted, [1, 2, 3, 4, LARGE, 5])], [3])
    assert torch.equal(found[:1], expected)
    assert bool(found[1:].isnan().all())
    drafted.rewind(3)
    assert torch.equal(model.step([(drafted, [7])]), model.step([(plain, [7])]))
    assert not model.notes


def test_a_text_that_float16_cannot_hold_is_widened_with_its_guesses(overflowing):
    model, wide = CpuEngine().load(overflowing, threads=1), CpuEngine().load(overflowing, cache="float32", threads=1)
    sequence = model.open()
    model.step([(sequence, [1, 2, 3])])
    found = model.step([(sequence, [LARGE, 4, 5])], [2])
    assert torch.equal(found, torch.stack([fresh(wide, [1, 2, 3, LARGE, 4, 5][:end]) for end in (4, 5, 6)]))
    assert len(model.notes) == 1

"""Which text a request takes keys and values from."""

import random

import pytest

from quern.generation.prefixes import BLOCK, Prefixes, Text


class Closed:
    """Stands for a sequence."""

    def __init__(self):
        self.open = True

    def close(self):
        assert self.open
        self.open = False


def text(ids):
    return Text(Closed(), list(ids))


def plainly(texts, ids):
    """Tokens that the best of ``texts`` shares: whole blocks, fewer than all."""

    def shared(other):
        count = next(
            (place for place, (a, b) in enumerate(zip(other, ids, strict=False)) if a != b), min(len(other), len(ids))
        )
        return min(count, len(ids) - 1) // BLOCK * BLOCK

    return max((shared(other.ids) for other in texts), default=0)


@pytest.mark.parametrize("seed", range(5))
def test_the_longest_common_beginning_is_found(seed):
    draw = random.Random(seed)
    prefixes, known = Prefixes(most=12), []
    for _ in range(200):
        base = draw.choice(known).ids[: draw.randrange(120)] if known and draw.random() < 0.8 else []
        ids = [*base, *(draw.randrange(2) for _ in range(draw.randrange(1, 60)))]
        found = prefixes.longest(ids)
        assert (found[1] if found else 0) == plainly(known, ids)
        if found:
            assert found[0].ids[: found[1]] == ids[: found[1]]
            assert found[0].sequence.open
        prefixes.keep(new := text(ids))
        known = [*(one for one in known if one.sequence.open), new]
    assert len(prefixes) == 12


def test_a_text_that_still_grows_is_found_as_far_as_it_was_read():
    prefixes, growing = Prefixes(), text(range(BLOCK))
    prefixes.note(growing)
    wanted = list(range(5 * BLOCK))
    assert prefixes.longest(wanted) == (growing, BLOCK)
    growing.ids += range(BLOCK, 3 * BLOCK + 5)
    prefixes.note(growing)
    assert prefixes.longest(wanted) == (growing, 3 * BLOCK)
    prefixes.forget(growing)
    assert prefixes.longest(wanted) is None
    assert not growing.sequence.open


def test_the_oldest_use_goes_first():
    prefixes = Prefixes()
    texts = [text([number] * 2 * BLOCK) for number in range(3)]
    for one in texts:
        prefixes.keep(one)
    prefixes.longest([0] * 2 * BLOCK)
    assert prefixes.evict()
    assert [one.sequence.open for one in texts] == [True, False, True]
    assert prefixes.evict()
    assert prefixes.evict()
    assert not prefixes.evict()


def test_texts_whose_hashes_agree_are_still_told_apart():
    prefixes = Prefixes()
    known = text([7] * BLOCK)
    prefixes.keep(known)
    known.ids[3] = 8  # as if another text had the hash
    assert prefixes.longest([7] * 2 * BLOCK) is None

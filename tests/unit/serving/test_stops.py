"""Stop texts: found wherever a piece ends, never shown in part."""

import itertools

import pytest

from quern.serving.stops import StopTexts


def shown(stops, pieces):
    found = StopTexts(stops)
    said = "".join(found.push(piece) for piece in pieces)
    return said + found.finish(), found.found


@pytest.mark.parametrize(
    ("stops", "text", "expected", "hit"),
    [
        (["END"], "one END two", "one ", "END"),
        (["END"], "one EN", "one EN", None),
        (["ab", "abc"], "xabcd", "x", "ab"),
        (["abcd", "bc"], "xabcd", "xa", "bc"),
        (["b", "ab"], "xab", "x", "ab"),
        (["aab"], "aaab", "a", "aab"),
        ([], "all of it", "all of it", None),
        ([""], "all of it", "all of it", None),
        (["終"], "始終始", "始", "終"),
    ],
)
def test_every_way_to_cut_a_text_into_pieces_gives_the_same(stops, text, expected, hit):
    for places in itertools.chain.from_iterable(
        itertools.combinations(range(1, len(text)), count) for count in range(3)
    ):
        ends = [0, *places, len(text)]
        pieces = [text[start:stop] for start, stop in itertools.pairwise(ends)]
        assert shown(stops, pieces) == (expected, hit), pieces


def test_what_cannot_be_the_beginning_of_a_stop_text_is_shown_at_once():
    stops = StopTexts(["\n\n"])
    assert stops.push("one") == "one"
    assert stops.push("\n") == ""
    assert stops.push("two") == "\ntwo"

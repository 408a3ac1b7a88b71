"""The time left is right within 15 % once the first block is done: on made-up times, with a clock of their own."""

import random
import threading

import pytest

from quern.core.machine.time_left import Pace, Work

WITHIN = 0.15


def worst(durations, work, done=0, first=1, every=7):
    """The greatest share by which the time left is wrong, from the end of step ``first`` of this run on, within steps too."""
    now, errors = 5000.0, []
    pace = Pace(len(durations), done, now, work)
    end = now + sum(durations[done:])
    for number, seconds in enumerate(durations[done:], start=1):
        for moment in range(every):
            at = now + seconds * moment / every
            left = pace.left(at)
            assert (left is None) == (number == 1)
            if number > first:
                errors.append(abs(left - (end - at)) / (end - at))
        now += seconds
        pace.advance(1, now)
    assert pace.left(now) == 0
    return max(errors)


def times(work, draw, noise=0.05, products=1e9, rounding=3e8):
    """What a machine takes whose rates for products and for rounding differ; of ``work`` each size is split evenly."""
    each = [step.size / 2 / products + step.size / 2 / rounding for step in work]
    return [seconds * (1 + draw.uniform(-noise, noise)) for seconds in each]


@pytest.mark.parametrize("seed", range(5))
def test_equal_blocks_of_a_large_model(seed):
    """80 blocks of about 200 s, each 5 % up or down."""
    draw = random.Random(seed)
    durations = [200 * (1 + draw.uniform(-0.05, 0.05)) for _ in range(80)]
    # The last steps are excluded: within the last one its own 5 % are all that there is.
    alike = [Work("block", 1e11)] * 80
    assert worst(durations[:-1], alike[:-1], every=1) < WITHIN
    assert worst(durations[:-1], None, every=1) < WITHIN


@pytest.mark.parametrize("seed", range(5))
def test_blocks_of_other_sizes_that_were_not_seen_yet(seed):
    """A dense block in front of routed ones that are nine times as much work: the first alone says what these will take."""
    draw = random.Random(seed)
    work = [Work("dense", 1e11)] + [Work("routed", 9e11)] * 30
    durations = times(work, draw)
    assert worst(durations, work, every=1) < WITHIN
    naive = Pace(31, 0, 0.0)
    naive.advance(1, durations[0])
    assert naive.left(durations[0]) < sum(durations[1:]) / 5, "counted in blocks it would be wrong by far"


def test_kinds_that_were_seen_take_what_they_took_whatever_their_sizes_say():
    """Three of one kind, one of another, of which the counted work is off by a factor of three."""
    work = [Work("full" if at % 4 == 3 else "linear", 1e11) for at in range(48)]
    durations = [300.0 if step.kind == "full" else 100.0 for step in work]
    assert worst(durations, work, first=4) < 1e-9
    assert worst(durations, [Work("same", 1e11)] * 48, first=4, every=1) > WITHIN


def test_in_the_middle_of_a_step_its_time_counts():
    pace = Pace(10, 0, 0.0, [Work("block", 1.0)] * 10)
    pace.advance(1, 200.0)
    assert [pace.left(200.0 + gone) for gone in (0, 50, 199, 200, 5000)] == [1800, 1750, 1601, 1600, 1600]
    same = Pace(10, 0, 0.0)
    same.advance(1, 200.0)
    assert [same.left(200.0 + gone) for gone in (0, 50, 199)] == [1800, 1750, 1601]
    assert same.left(1e9) == 0, "it is overdue, and not more than done"


def test_a_resumed_run_counts_its_own_steps_only():
    """An earlier run did 60 of 80 blocks on another machine."""
    work = [Work("block", 1e11)] * 80
    pace = Pace(80, 60, 1e6, work)
    assert pace.left(1e6 + 100) is None
    pace.advance(1, 1e6 + 150)
    assert pace.left(1e6 + 150) == 19 * 150
    bytes_ = Pace(4e9, 1e9, 0.0)
    bytes_.advance(1e9, 10.0)
    assert bytes_.left(10.0) == 20.0


def test_what_took_longer_of_late_counts():
    """Somebody else's job has begun on the machine: after a few steps the estimate has followed."""
    work = [Work("block", 1.0)] * 200
    pace, now = Pace(200, 0, 0.0, work), 0.0
    for at in range(120):
        now += 100 if at < 100 else 200
        pace.advance(1, now)
    assert pace.left(now) == pytest.approx(80 * 200, rel=0.01)


def test_several_steps_at_once_and_no_work_at_all():
    pace = Pace(4, 0, 0.0, [Work("a", 1.0), Work("b", 3.0), Work("a", 1.0), Work("b", 0.0)])
    pace.advance(2, 8.0)
    assert pace.left(8.0) == 2.0
    nothing = Pace(2, 0, 0.0, [Work("a", 0.0), Work("a", 0.0)])
    nothing.advance(1, 5.0)
    assert nothing.left(5.0) == 0.0


def test_threads_may_advance_one_task():
    pace = Pace(8000, 0, 0.0)
    threads = [threading.Thread(target=lambda: [pace.advance(1, 1.0) for _ in range(1000)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pace.done == 8000

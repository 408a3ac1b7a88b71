"""How many threads work gets."""

import pytest

from quern.core.errors import UserError
from quern.core.machine.parallel import MOST_THREADS, Workers, available_threads, thread_count


def test_all_processors_or_what_is_asked_for():
    assert thread_count(None) == available_threads() >= 1
    assert [thread_count(1), thread_count(MOST_THREADS)] == [1, MOST_THREADS]


@pytest.mark.parametrize("threads", [0, -1, MOST_THREADS + 1, 2.0, "2", True])
def test_what_is_no_number_of_threads_is_refused(threads):
    with pytest.raises(UserError, match="whole number from 1 to 1024"):
        Workers(threads)

"""Lines about work that says nothing itself."""

import threading

import pytest

from quern.core.progress import telling


class Listener:
    def __init__(self, lines):
        self.said, self.enough, self.lines = [], threading.Event(), lines

    def log(self, message):
        self.said.append(message)
        if len(self.said) == self.lines:
            self.enough.set()


def test_it_tells_until_the_work_ends_and_no_longer():
    listener = Listener(3)
    with telling(listener, lambda: "still here", 0.001):
        assert listener.enough.wait(60)
    assert set(listener.said) == {"still here"}


def test_work_that_fails_ends_it_too():
    threads = threading.active_count()
    with pytest.raises(KeyError), telling(Listener(1), lambda: "x", 60):
        raise KeyError
    assert threading.active_count() == threads

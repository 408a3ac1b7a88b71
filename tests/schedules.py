"""Requests on a scheduler that is stepped by hand, and the same request alone on the model."""

import random

from quern.generation.generate import continuation
from quern.generation.sampling import Sampler
from quern.serving.request import Piece
from quern.serving.scheduler import Limits, Scheduler

END = 256


def decode(ids):
    return "".join(chr(0x4E00 + token) for token in ids)


def scheduler(model, speculation=None, context=None, **limits):
    return Scheduler(model, decode, frozenset([END]), Limits(**limits), context, speculation)


def prompt(seed, length, vocabulary=256):
    draw = random.Random(seed)
    return tuple(draw.randrange(vocabulary) for _ in range(length))


def alone(model, request):
    """The answer of a session that nobody shares."""
    sampler = Sampler(request.sampling, request.seed)
    session = model.start()
    return list(continuation(session, list(request.ids), request.max_tokens, sampler, frozenset([END])))


def drained(one, wanted, after=0):
    """Submit all, some of them later, and step until all are done; events by request."""
    events = [[] for _ in wanted]
    for request, told in zip(wanted[: len(wanted) - after], events, strict=False):
        one.submit(request, told.append)
    steps = 0
    while one.running or one.waiting or after:
        one.step()
        steps += 1
        if after and steps % 3 == 0:
            one.submit(wanted[-after], events[-after].append)
            after -= 1
        assert steps < 5000
    return events


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, Piece))

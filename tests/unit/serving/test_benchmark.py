"""What a benchmark of a server makes of the times it sees, and what it asks."""

import json
from itertools import pairwise

import pytest

from quern.core.errors import UserError
from quern.serving.benchmark.client import Timing, _read
from quern.serving.benchmark.loads import arrivals
from quern.serving.benchmark.measure import bench_serve, check
from quern.serving.benchmark.results import Load, Workload, summary
from quern.serving.benchmark.target import WORDS, Target, base_of


def test_figures_of_known_times():
    timings = [
        Timing(first=0.1, gaps=[0.01, 0.02, 0.03], end=0.16, prompt_tokens=10, cached_tokens=4, answer_tokens=4),
        Timing(first=0.3, gaps=[0.05], end=0.36, prompt_tokens=20, cached_tokens=0, answer_tokens=3),
        Timing(end=5.0, error="status 429: no"),
        Timing(end=5.0, error="status 429: no"),
    ]
    found = summary(Load(rate=2.0), timings, 0.5)
    assert (found.completed, found.failed, found.errors) == (2, 2, {"status 429: no": 2})
    assert (found.prompt_tokens, found.cached_tokens, found.answer_tokens) == (30, 4, 7)
    assert (found.request_throughput, found.output_throughput, found.total_token_throughput) == (4, 14, 74)
    assert found.ttft_ms.mean == found.ttft_ms.median == pytest.approx(200)
    assert found.ttft_ms.p99 == pytest.approx(100 + 0.99 * 200)
    assert found.tpot_ms.mean == pytest.approx((20 + 30) / 2)
    assert found.itl_ms.median == pytest.approx(25)
    assert found.e2el_ms.mean == pytest.approx(260)


def test_figures_of_nothing():
    found = summary(Load(concurrency=1), [Timing(error="x")], 1.0)
    assert found.ttft_ms is found.itl_ms is found.tpot_ms is found.e2el_ms is found.cached_tokens is None
    assert found.output_throughput == 0


@pytest.mark.parametrize("rate", [0.5, 4.0])
def test_arrivals_are_a_poisson_process_of_the_rate(rate):
    times = arrivals(rate, 4000, seed=3)
    assert times == arrivals(rate, 4000, seed=3) != arrivals(rate, 4000, seed=4)
    assert times[0] == 0
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / rate, rel=0.06)  # 4 standard errors
    assert deviation == pytest.approx(mean, rel=0.1)  # exponential gaps


def test_prompts_have_their_length_and_share_their_beginning():
    target = Target("", tokens=tuple(range(100, 160)))
    workload = Workload(prompt_tokens=40, shared_prefix=0.25, requests=6, seed=1)
    first, again, other = (list(target.prompts(workload, load)) for load in (0, 0, 1))
    assert first == again
    assert {len(prompt) for prompt in first + other} == {40}
    assert len({tuple(prompt[:10]) for prompt in first + other}) == 1
    assert len({tuple(prompt[10:]) for prompt in first + other}) == 12
    assert all(token in target.tokens for prompt in first for token in prompt)


def test_prompts_of_words_where_a_server_does_not_tokenize():
    target = Target("", _per_word=1.25)
    prompt, _ = target.prompts(Workload(prompt_tokens=50, requests=2))
    assert len(prompt.split(" ")) == 40
    assert set(prompt.split(" ")) <= set(WORDS)


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080/v1"),
        ("localhost:8000/", "http://localhost:8000/v1"),
        ("https://host/v3", "https://host/v3"),
        ("http://[::1]:1/v1/completions", "http://[::1]:1/v1"),
    ],
)
def test_urls(url, base):
    assert base_of(url) == base


@pytest.mark.parametrize("url", ["", "ftp://x", "http://", "http://x:999999", "http://[::1", "x:y"])
def test_what_is_no_url(url):
    with pytest.raises(UserError, match="address of a server"):
        base_of(url)


@pytest.mark.parametrize(
    ("load", "workload", "said"),
    [
        (Load(rate=0.0), {}, "rate"),
        (Load(rate=float("nan")), {}, "rate"),
        (Load(rate=float("inf")), {}, "rate"),
        (Load(concurrency=0), {}, "concurrency"),
        (Load(concurrency=10**9), {}, "concurrency"),
        (Load(concurrency=1), {"requests": 0}, "requests"),
        (Load(concurrency=1), {"prompt_tokens": 1 << 40}, "prompt_tokens"),
        (Load(concurrency=1), {"answer_tokens": 0}, "answer_tokens"),
        (Load(concurrency=1), {"shared_prefix": 1.5}, "shared_prefix"),
        (Load(concurrency=1), {"shared_prefix": float("nan")}, "shared_prefix"),
    ],
)
def test_what_cannot_be_measured(load, workload, said):
    with pytest.raises(UserError, match=said):
        check([load], Workload(**workload))


def test_what_is_refused_before_anything_is_asked(tmp_path):
    with pytest.raises(UserError, match="at least"):
        check([], Workload())
    with pytest.raises(UserError, match="either a model"):
        bench_serve()
    with pytest.raises(UserError, match="either a model"):
        bench_serve("x", url="http://127.0.0.1:1")
    with pytest.raises(UserError, match="nothing answers at http://127.0.0.1:1/v1"):
        bench_serve(url="http://127.0.0.1:1")
    (tmp_path / "there").write_text("")
    with pytest.raises(UserError, match="exists; choose another output"):
        bench_serve(url="http://127.0.0.1:1", output=tmp_path / "there")
    assert (tmp_path / "there").read_text() == ""


def read(*chunks):
    """What the client makes of a stream's lines."""
    import asyncio
    import time

    async def lines():
        for chunk in chunks:
            yield ": a comment"
            yield f"data: {chunk if isinstance(chunk, str) else json.dumps(chunk)}"
            yield ""

    found = Timing()
    asyncio.run(_read(lines(), found, time.perf_counter()))
    return found


def piece(text, reason=None, **more):
    return {"choices": [{"text": text, "finish_reason": reason}], **more}


def test_streams_of_other_servers():
    usage = {"prompt_tokens": 5, "completion_tokens": 9, "prompt_tokens_details": None}
    found = read(piece("a"), piece("bc"), piece("", "stop"), {"choices": [], "usage": usage}, "[DONE]")
    assert (found.text, found.error, len(found.gaps)) == ("abc", None, 1)
    assert (found.prompt_tokens, found.answer_tokens, found.cached_tokens) == (5, 9, None)
    assert read(piece("a"), piece("b"), "[DONE]").answer_tokens == 2
    assert read(piece("a"), piece("b", "length")).error is None
    assert read(piece("a"), piece("b")).error == "the stream broke off"
    assert "overloaded" in read(piece("a"), {"error": {"message": "overloaded"}}).error

"""Timing with a clock of our own, memory of real processes, energy from counters that we write ourselves."""

import math
import subprocess
import sys

import pytest
from fake_model import VOCABULARY, FakeModel, bigram_table

from quern.core.errors import QuernError, UserError
from quern.core.metrics import MetricError
from quern.core.results import Figure
from quern.evaluation import energy
from quern.evaluation.energy import RaplMeter, find_meter
from quern.evaluation.measures.base import passes, summarized
from quern.evaluation.peak_memory import peak_rss_bytes
from quern.evaluation.speed import SpeedRound, prompt_of, speed_round


class Clock:
    """A second passes with every look at it."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1
        return self.now


def over_rounds(rounds):
    """Figures by name from several rounds."""
    (together,) = passes("rounds")
    return summarized(together, [each.to_json() for each in rounds], seed=0)


class Meter:
    def measure(self, work):
        return work(), 12.5


class TestSpeed:
    def test_what_is_timed(self):
        fed = []

        class Session:
            def feed(self, ids):
                fed.append(ids)
                return model.table[ids[-1]]

        model = FakeModel(bigram_table())
        model.start = Session
        found = speed_round(model, [3, 4, 5], 4, clock=Clock())
        greedy = [5]
        for _ in range(5):
            greedy.append(int(model.table[greedy[-1]].argmax()))
        assert fed == [[3, 4, 5], *([token] for token in greedy[1:5])]
        assert found == SpeedRound(3, 1.0, 3.0, 4, 1.0, None)

    def test_energy_is_that_of_decoding(self):
        assert speed_round(FakeModel(bigram_table()), [3], 5, meter=Meter()).decode_joules == 12.5

    @pytest.mark.parametrize(("prompt", "decode"), [([], 4), ([1], 0), ([1] * 60, 5)])
    def test_rounds_that_cannot_be(self, prompt, decode):
        with pytest.raises(UserError):
            speed_round(FakeModel(bigram_table()), prompt, decode)

    def test_summary(self):
        rounds = [SpeedRound(100, seconds, seconds + 1, 10, 2 * seconds, 5.0) for seconds in (1.0, 4.0, 2.0)]
        assert over_rounds(rounds) == {
            "prefill": Figure(value=50.0, interval=(25.0, 100.0), unit="tokens/s", rounds=3),
            "decode": Figure(value=2.5, interval=(1.25, 5.0), unit="tokens/s", rounds=3),
            "first": Figure(value=3.0, interval=(2.0, 5.0), unit="s", rounds=3),
            "energy": Figure(value=0.5, unit="J/token"),
        }

    def test_energy_that_a_round_lacks_is_not_measured(self):
        rounds = [SpeedRound(1, 1.0, 1.0, 1, 1.0, joules) for joules in (1.0, None)]
        assert "energy" not in over_rounds(rounds)

    def test_no_rounds(self):
        with pytest.raises(MetricError):
            over_rounds([])

    def test_not_a_time(self):
        with pytest.raises(MetricError):
            over_rounds([SpeedRound(1, math.nan, 1.0, 1, 1.0, None)])

    def test_prompt_is_seeded_and_in_the_vocabulary(self):
        prompt = prompt_of(200, VOCABULARY, seed=1)
        assert prompt == prompt_of(200, VOCABULARY, seed=1) != prompt_of(200, VOCABULARY, seed=2)
        assert len(prompt) == 200
        assert 0 <= min(prompt) <= max(prompt) < VOCABULARY


class TestMemory:
    def run(self, code, **options):
        return subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            **options,
        )

    def test_the_peak_stays_after_memory_is_given_back(self):
        size = 64 << 20
        code = f"x = bytearray({size}); x[::4096] = b'1' * len(x[::4096]); del x; print(flush=True); input()"
        with self.run(code) as process:
            process.stdout.readline()
            peak = peak_rss_bytes(process.pid)
            process.stdin.close()
        assert size < peak < size + (64 << 20)

    def test_children_count(self):
        inner = f"x = bytearray({64 << 20}); x[::4096] = b'1' * len(x[::4096]); print(flush=True); input()"
        outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
        with self.run(outer) as process:
            process.stdout.readline()
            peak = peak_rss_bytes(process.pid)
            process.stdin.close()
        assert peak > 64 << 20

    def test_own_process(self):
        assert peak_rss_bytes() > 10 << 20

    def test_a_process_that_is_gone(self):
        with self.run("pass") as process:
            process.wait()
        with pytest.raises(QuernError, match="has ended"):
            peak_rss_bytes(process.pid)


@pytest.fixture
def powercap(tmp_path):
    def write(number, name, microjoules, wrap=1_000_000_000):
        domain = tmp_path / f"intel-rapl:{number}"
        domain.mkdir(exist_ok=True)
        (domain / "name").write_text(f"{name}\n")
        (domain / "energy_uj").write_text(f"{microjoules}\n")
        (domain / "max_energy_range_uj").write_text(f"{wrap}\n")

    return tmp_path, write


class TestRapl:
    def test_packages_and_memory_add_up(self, powercap):
        root, write = powercap
        names = {"0": "package-0", "0:0": "core", "0:1": "dram", "1": "package-1", "2": "psys"}
        for number, name in names.items():
            write(number, name, 1_000_000)

        def work():
            for extra, (number, name) in enumerate(names.items(), start=1):
                write(number, name, 1_000_000 + 10**extra * 1000)
            return "done"

        # package-0: 10 mJ, dram: 1 J, package-1: 10 J; core is part of the package and psys contains everything.
        assert RaplMeter.find(root).measure(work) == ("done", 0.01 + 1 + 10)

    def test_the_counter_wraps(self, powercap):
        root, write = powercap
        write("0", "package-0", 999_000_000)
        joules = RaplMeter.find(root).measure(lambda: write("0", "package-0", 2_000_000))[1]
        assert joules == 3.0

    def test_so_long_that_it_may_have_wrapped_twice(self, powercap, monkeypatch):
        root, write = powercap
        write("0", "package-0", 0)
        monkeypatch.setattr(energy, "WATTS_AT_MOST", 1e15)
        assert RaplMeter.find(root).measure(lambda: sum(range(10_000)))[1] is None

    def test_the_machines_own_counters_are_found(self, powercap, monkeypatch):
        root, write = powercap
        monkeypatch.setattr(energy, "POWERCAP", root)
        assert find_meter() is None
        write("0", "package-0", 1)
        assert find_meter() == RaplMeter((root / "intel-rapl:0",))

    def test_nothing_there(self, tmp_path):
        assert RaplMeter.find(tmp_path) is None
        assert RaplMeter.find(tmp_path / "none") is None

    def test_a_counter_that_cannot_be_read_means_no_meter(self, powercap):
        root, write = powercap
        write("0", "package-0", 1)
        write("1", "package-1", 1)
        (root / "intel-rapl:1" / "energy_uj").write_text("not a number\n")
        assert RaplMeter.find(root) is None

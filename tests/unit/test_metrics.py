"""Every statistic against closed forms, and every one of them must fail where it has no answer."""

import itertools
import math

import numpy as np
import pytest

from quern.core import metrics
from quern.core.errors import UserError
from quern.core.metrics import MetricError, NonFiniteError

TOKENS, VOCABULARY = 7, 33


@pytest.fixture
def random():
    return np.random.default_rng(20)


@pytest.fixture
def logits(random):
    return random.normal(scale=3, size=(TOKENS, VOCABULARY)).astype(np.float32)


def two_class(probability):
    """Logits whose softmax is (probability, 1 - probability)."""
    return np.array([[math.log(probability / (1 - probability)), 0.0]])


PAIRED = [metrics.divergence_per_token, metrics.mean_divergence, metrics.same_top1, metrics.top1_agreement]


def test_errors_are_the_users():
    assert issubclass(MetricError, UserError)
    assert issubclass(MetricError, ValueError)
    assert issubclass(NonFiniteError, MetricError)


class TestDivergence:
    @pytest.mark.parametrize(("p", "q"), [(0.5, 0.25), (0.9, 0.1), (0.01, 0.02), (0.3, 0.3)])
    def test_two_classes(self, p, q):
        expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        # A sum of two products, each of a few roundings of numbers near 1.
        assert metrics.mean_divergence(two_class(p), two_class(q)) == pytest.approx(expected, abs=1e-14)

    def test_uniform_reference(self):
        """KL(uniform || q) = -log V - mean log q."""
        q = np.array([0.5, 0.25, 0.125, 0.125])
        expected = -math.log(4) - np.log(q).mean()
        assert metrics.mean_divergence(np.zeros((1, 4)), np.log(q)[None]) == pytest.approx(expected, abs=1e-14)

    def test_direction_matters(self):
        """The swapped call gives another number: the order of arguments cannot be mixed up unseen."""
        forward = metrics.mean_divergence(two_class(0.9), two_class(0.5))
        backward = metrics.mean_divergence(two_class(0.5), two_class(0.9))
        assert forward == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-14)
        assert backward == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5), abs=1e-14)
        assert abs(forward - backward) > 0.1

    def test_swapped_sign_is_no_agreement(self, logits):
        assert metrics.mean_divergence(logits, -logits) > 1
        assert metrics.top1_agreement(logits, -logits) < 0.5

    def test_equal_is_zero(self, logits):
        assert (metrics.divergence_per_token(logits, logits) == 0).all()

    def test_never_negative_and_grows_with_noise(self, random, logits):
        noise = random.normal(size=logits.shape)
        means = []
        for scale in (1e-7, 1e-4, 1e-2, 0.1, 1.0):
            divergence = metrics.divergence_per_token(logits, logits + scale * noise)
            assert (divergence >= 0).all()
            means.append(divergence.mean())
        assert means == sorted(means)
        # Second order in the noise: KL = Var_p(noise) / 2 + O(noise^3).
        p = np.exp(logits - logits.max(1, keepdims=True)).astype(np.float64)
        p /= p.sum(1, keepdims=True)
        variance = (p * noise**2).sum(1) - (p * noise).sum(1) ** 2
        assert means[2] == pytest.approx(float(variance.mean()) * 1e-4 / 2, rel=0.05)

    def test_a_constant_added_to_all_logits_changes_nothing(self, random, logits):
        other = random.normal(size=logits.shape)
        plain = metrics.divergence_per_token(logits, other)
        shifted = metrics.divergence_per_token(logits.astype(np.float64) + 1e4, other - 1e4)
        # float64 keeps 1e4 + x to 2e-12, and KL adds up differences of such numbers weighted by p.
        np.testing.assert_allclose(shifted, plain, rtol=0, atol=1e-10)

    def test_huge_logits_do_not_overflow(self):
        certain = np.array([[2000.0, 0.0, -2000.0]])
        other = np.array([[0.0, 2000.0, -2000.0]])
        assert metrics.mean_divergence(certain, other) == pytest.approx(2000.0, rel=1e-12)
        assert metrics.mean_divergence(certain, certain) == 0

    def test_float32_logits_are_summed_in_float64(self, random):
        """float32 logits give bit for bit what the same numbers in float64 give, also for a large vocabulary."""
        reference = random.normal(size=(2, 150_000)).astype(np.float32)
        other = (reference + random.normal(scale=1e-3, size=reference.shape)).astype(np.float32)
        exact = metrics.divergence_per_token(reference.astype(np.float64), other.astype(np.float64))
        assert (metrics.divergence_per_token(reference, other) == exact).all()
        assert metrics.mean_divergence(reference, other) == pytest.approx(5e-7, rel=0.05)

    def test_blocks_do_not_show(self, random, monkeypatch):
        a, b = random.normal(size=(2, TOKENS, VOCABULARY))
        whole = metrics.divergence_per_token(a, b)
        monkeypatch.setattr(metrics, "_BLOCK", 2 * VOCABULARY)
        assert (metrics.divergence_per_token(a, b) == whole).all()


class TestLogitsThatHaveNoStatistic:
    @pytest.mark.parametrize("statistic", PAIRED)
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("first", [True, False])
    def test_not_finite(self, statistic, bad, first, logits):
        spoiled = logits.copy()
        spoiled[3, 5] = bad
        with pytest.raises(NonFiniteError, match="1 NaN or infinite"):
            statistic(*((spoiled, logits) if first else (logits, spoiled)))

    @pytest.mark.parametrize("statistic", PAIRED)
    def test_shapes(self, statistic, logits):
        for other in (logits[:-1], logits[:, :-1], logits.T, logits[0], logits[None]):
            with pytest.raises(MetricError):
                statistic(logits, other)

    @pytest.mark.parametrize("statistic", PAIRED)
    def test_empty(self, statistic):
        for shape in ((0, 5), (5, 0), (0, 0)):
            with pytest.raises(MetricError, match="not empty"):
                statistic(np.zeros(shape), np.zeros(shape))

    @pytest.mark.parametrize("statistic", PAIRED)
    def test_integers_are_no_logits(self, statistic):
        with pytest.raises(MetricError, match="floats"):
            statistic(np.ones((2, 3), dtype=np.int64), np.ones((2, 3), dtype=np.int64))


class TestLikelihood:
    def test_uniform(self):
        nats = metrics.nats_per_token(np.zeros((5, 8)), np.arange(5))
        np.testing.assert_allclose(nats, math.log(8), rtol=1e-15)
        assert metrics.perplexity(float(nats.sum()), 5) == pytest.approx(8, rel=1e-14)

    def test_picks_the_target(self):
        logits = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]))
        np.testing.assert_allclose(metrics.nats_per_token(logits, [0, 1]), [-math.log(0.7), -math.log(0.1)], rtol=1e-14)

    def test_agrees_with_divergence(self, random):
        """KL of a one-hot reference is the negative log-likelihood of its token."""
        logits = random.normal(size=(4, 9))
        targets = np.array([0, 8, 3, 3])
        certain = np.full((4, 9), -1e6)
        certain[np.arange(4), targets] = 1e6
        np.testing.assert_allclose(
            metrics.divergence_per_token(certain, logits), metrics.nats_per_token(logits, targets), rtol=1e-12
        )

    @pytest.mark.parametrize(
        "targets", [[0, 1], [0, 1, 33, 2, 2, 2, 2], [-1] * TOKENS, [0.0] * TOKENS, [[0] * TOKENS], []]
    )
    def test_targets_that_do_not_fit(self, targets, logits):
        with pytest.raises(MetricError, match="targets"):
            metrics.nats_per_token(logits, np.array(targets))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, bad, logits):
        logits[0, 0] = bad
        with pytest.raises(NonFiniteError):
            metrics.nats_per_token(logits, np.ones(TOKENS, dtype=int))

    def test_empty(self):
        with pytest.raises(MetricError, match="not empty"):
            metrics.nats_per_token(np.zeros((0, 5)), np.zeros(0, dtype=int))

    @pytest.mark.parametrize(("nats", "tokens"), [(1.0, 0), (1.0, -1), (-1.0, 3)])
    def test_perplexity_of_nothing_or_of_a_swapped_sign(self, nats, tokens):
        with pytest.raises(MetricError):
            metrics.perplexity(nats, tokens)

    @pytest.mark.parametrize("nats", [math.nan, math.inf, -math.inf, 1e9])
    def test_perplexity_not_finite(self, nats):
        with pytest.raises(NonFiniteError):
            metrics.perplexity(nats, 10)


class TestTop1:
    def test_counts(self):
        reference = np.array([[1.0, 2, 3], [3, 2, 1], [1, 3, 2], [5, 5, 0]])
        model = np.array([[1.0, 2, 3], [1, 2, 3], [1, 3, 2], [5, 4, 0]])
        assert metrics.same_top1(reference, model).tolist() == [True, False, True, True]
        assert metrics.top1_agreement(reference, model) == 0.75


class TestSignalToNoise:
    @pytest.mark.parametrize("relative", [1e-3, 0.1, 1.0])
    def test_known(self, relative):
        signal = np.ones(100)
        error = signal * relative
        expected = -20 * math.log10(relative)
        assert metrics.signal_to_quantization_noise(signal, signal + error) == pytest.approx(expected, abs=1e-9)

    def test_six_decibels_a_bit(self, random):
        """Uniform noise of step d has variance d^2 / 12, so halving the step gains 20 log10(2) = 6.02 dB."""
        signal = random.uniform(-1, 1, 200_000)
        values = [metrics.signal_to_quantization_noise(signal, np.round(signal / d) * d) for d in (2**-6, 2**-7)]
        # Energy 1/3 against d^2/12; 200,000 samples estimate each variance to 0.3 % = 0.014 dB.
        assert values[0] == pytest.approx(10 * math.log10(4 * 2**12), abs=0.06)
        assert values[1] - values[0] == pytest.approx(20 * math.log10(2), abs=0.06)

    def test_exact_is_infinite(self):
        assert metrics.signal_to_quantization_noise([1.0, 2.0], [1.0, 2.0]) == math.inf

    def test_swapped_sign_is_worse_than_nothing(self):
        assert metrics.signal_to_quantization_noise([1.0, 2.0], [-1.0, -2.0]) == pytest.approx(-6.02, abs=0.01)

    @pytest.mark.parametrize(
        ("signal", "approximation"),
        [([], []), ([1.0], [1.0, 2.0]), ([0.0, 0.0], [0.0, 0.0]), ([1.0, math.nan], [1.0, 1.0]), ([1.0], [math.inf])],
    )
    def test_no_answer(self, signal, approximation):
        with pytest.raises(MetricError):
            metrics.signal_to_quantization_noise(signal, approximation)


class TestSize:
    def test_bits_per_weight(self):
        assert metrics.bits_per_weight(2_000, 1_000) == 16.0
        assert metrics.bits_per_weight(550, 1_000) == 4.4

    def test_compression(self):
        assert metrics.compression(250, 1_000) == 0.75
        assert metrics.compression(2_000, 1_000) == -1.0

    @pytest.mark.parametrize(("a", "b"), [(0, 1), (1, 0), (-1, 5), (5, -1)])
    def test_nothing(self, a, b):
        for statistic in (metrics.bits_per_weight, metrics.compression):
            with pytest.raises(MetricError):
                statistic(a, b)


class TestInterval:
    def test_mean_is_weighted_by_tokens(self):
        estimate = metrics.weighted_mean([10.0, 0.0], [10, 90], seed=0)
        assert estimate.mean == 0.1
        # Two documents: a quarter of the draws each is all the one and all the other.
        assert estimate.interval == (0.0, 1.0)

    def test_all_draws_of_four_documents(self):
        """4^4 draws can be listed: a long document weighs more in each of them, not only in the mean."""
        sums, weights = np.array([1.0, 6.0, 2.0, 40.0]), np.array([10, 10, 20, 50])
        draws = np.array(list(itertools.product(range(4), repeat=4)))
        ratios = sums[draws].sum(axis=1) / weights[draws].sum(axis=1)
        estimate = metrics.weighted_mean(sums, weights, seed=0)
        assert estimate.mean == 49 / 90
        assert estimate.interval == tuple(np.quantile(ratios, [0.025, 0.975], method="inverted_cdf"))

    def test_covers_the_truth(self):
        """Of 200 normal samples of 40 documents, about 95 % of the intervals hold the mean (SE 1.5 %; small-sample
        percentile intervals cover a little less)."""
        random = np.random.default_rng(3)
        held = 0
        for trial in range(200):
            low, high = metrics.weighted_mean(random.normal(5, 1, 40), np.ones(40), seed=trial).interval
            held += low <= 5 <= high
        assert 0.88 <= held / 200 <= 0.99

    def test_width_follows_the_standard_error(self):
        values = np.random.default_rng(4).normal(0, 2, 400)
        low, high = metrics.weighted_mean(values, np.ones(400), seed=1).interval
        # 2 x 1.96 standard errors; the quantiles of 10,000 resamples are good to about 2 %.
        assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)

    def test_seed_decides(self):
        sums, weights = np.random.default_rng(5).normal(1, 1, 30), np.ones(30)
        first = metrics.weighted_mean(sums, weights, seed=7)
        assert first == metrics.weighted_mean(sums, weights, seed=7)
        assert first != metrics.weighted_mean(sums, weights, seed=8)

    def test_many_documents_in_steps(self, monkeypatch):
        values = np.random.default_rng(6).normal(size=50)
        monkeypatch.setattr(metrics, "_BLOCK", 64)
        monkeypatch.setattr(metrics, "RESAMPLES", 101)
        low, high = metrics.weighted_mean(values, np.ones(50), seed=0).interval
        assert low < values.mean() < high

    def test_one_document_has_no_interval(self):
        assert metrics.weighted_mean([3.0], [2], seed=0) == (1.5, None)

    @pytest.mark.parametrize(
        ("sums", "weights"),
        [([], []), ([1.0], [1, 2]), ([1.0, 2.0], [1, 0]), ([1.0, 2.0], [1, -1]), ([[1.0]], [[1.0]]), (1.0, 1.0)],
    )
    def test_no_answer(self, sums, weights):
        with pytest.raises(MetricError):
            metrics.weighted_mean(sums, weights, seed=0)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_not_finite(self, bad):
        with pytest.raises(NonFiniteError):
            metrics.weighted_mean([1.0, bad], [1, 1], seed=0)
        with pytest.raises(NonFiniteError):
            metrics.weighted_mean([1.0, 1.0], [1, bad], seed=0)


class TestPairedDifference:
    def test_known(self):
        ours = np.array([True] * 60 + [False] * 40)
        theirs = np.array([True] * 70 + [False] * 30)
        difference = metrics.paired_accuracy_difference(ours, theirs, seed=0)
        assert difference.mean == pytest.approx(-0.1, abs=1e-15)
        low, high = difference.interval
        # Ten differences of -1 among 100: standard error sqrt(.1 x .9 / 100) = .03.
        assert low == pytest.approx(-0.16, abs=0.02)
        assert high == pytest.approx(-0.045, abs=0.02)

    def test_swapped_arguments_swap_the_sign(self):
        random = np.random.default_rng(1)
        ours, theirs = random.random((2, 50)) < 0.6
        forward = metrics.paired_accuracy_difference(ours, theirs, seed=3)
        backward = metrics.paired_accuracy_difference(theirs, ours, seed=3)
        assert forward.mean == -backward.mean != 0
        assert forward.interval == pytest.approx((-backward.interval[1], -backward.interval[0]), abs=1e-12)

    def test_pairs_are_narrower_than_two_samples(self):
        """Two models right on the same items differ by nothing, however hard the items are."""
        correct = np.random.default_rng(2).random(100) < 0.5
        assert metrics.paired_accuracy_difference(correct, correct, seed=0) == (0.0, (0.0, 0.0))

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            ([], []),
            ([True], [True, False]),
            ([1.0, 0.0], [True, False]),
            ([True, math.nan], [True, True]),
            ([1, 0], [1, 1]),
        ],
    )
    def test_no_answer(self, ours, theirs):
        with pytest.raises(MetricError):
            metrics.paired_accuracy_difference(ours, theirs, seed=0)

    def test_accuracy(self):
        assert metrics.accuracy([True, False, True, True]) == 0.75
        for bad in ([], [1.0, 0.0], [math.nan]):
            with pytest.raises(MetricError):
                metrics.accuracy(bad)


class TestSummary:
    def test_known(self):
        assert metrics.summarize([3.0, 1.0, 2.0, 100.0]) == (2.5, 1.0, 100.0, 4)

    @pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
    def test_no_answer(self, values):
        with pytest.raises(MetricError):
            metrics.summarize(values)

"""Recommending among the rows of several tools: memory, agreement, target runtime, licence, and weights of one's own."""

from __future__ import annotations

import math
import re

import pytest
from artifacts import INT8
from sample_results import HQQ, LLAMA, make_reference, make_row, sample_rows, sample_tool_results, sample_tool_rows

from quern.advisor.deployment import licence_of, maker_of, runtime_target, targets_of
from quern.advisor.recommend import recommend
from quern.advisor.scoring import SCALING_EXPONENT, Weights
from quern.core.errors import UserError
from quern.core.results import Figure, Recommendation
from quern.peers.base import PEERS


def reasons(outcome: Recommendation) -> dict[str, str]:
    return {entry.name: entry.reason for entry in outcome.excluded}


def ranked(outcome: Recommendation) -> set[str]:
    return {entry.name for entry in outcome.ranking}


def test_every_row_of_every_tool_is_ranked_or_excluded_with_a_reason():
    outcome = recommend(sample_tool_results(), "overall")
    assert sorted([*ranked(outcome), *reasons(outcome)]) == sorted(row.name for row in sample_tool_rows())
    assert "KL 2.9 is 11.2 times" in reasons(outcome)["hqq-int2-g64"]


def test_largest_memory():
    rows = [
        make_row("within", peak_rss_bytes=2_000_000),
        make_row("over", peak_rss_bytes=3_000_000, bytes=400),
        make_row("unknown", peak_rss_bytes=None, bytes=400),
    ]
    outcome = recommend(rows, "storage", max_memory=2_000_000)
    assert outcome.choice == "within"
    assert reasons(outcome)["over"] == "peak memory 3 MB is 50.0 % over the 2 MB allowed (1 MB too many)"
    assert "memory was not measured" in reasons(outcome)["unknown"]
    assert any("peak memory at most 2 MB" in reason for reason in outcome.reasons)
    assert "Memory: 2 MB at its peak." in outcome.reasons


def test_largest_memory_with_a_long_text():
    def cache(each):
        return {"cache": Figure(value=each, unit="bytes/token")}

    rows = [
        make_row("int4 cache", peak_rss_bytes=1_000_000, figures=cache(100), kl_mean=0.02),
        make_row("float16 cache", peak_rss_bytes=1_000_000, figures=cache(500), bytes=400),
        make_row("unknown", peak_rss_bytes=1_000_000, bytes=400),
    ]
    outcome = recommend(rows, "storage", max_memory=2_000_000, context=4000)
    assert outcome.choice == "int4 cache"
    said = "peak memory with 4000 tokens of context 3 MB is 50.0 % over the 2 MB allowed (1 MB too many)"
    assert reasons(outcome)["float16 cache"] == said
    assert "its key/value cache was not measured" in reasons(outcome)["unknown"]
    assert "Memory: 1.4 MB at its peak with 4000 tokens of context." in outcome.reasons
    assert recommend(rows, "storage", max_memory=2_000_000).choice != "int4 cache", (
        "the peak alone says nothing against"
    )
    (refusal,) = recommend(rows[1:2], "storage", max_memory=2_000_000, context=4000).reasons
    assert "allow a peak memory of 3 MB" in refusal


def test_least_agreement():
    rows = [
        make_reference(top1_agreement=0.98),
        make_row("close", top1_agreement=0.97, bytes=600),
        make_row("far", top1_agreement=0.94),
        make_row("unknown", top1_agreement=None),
    ]
    outcome = recommend(rows, "storage", min_agreement=0.97)
    assert outcome.choice == "close"
    assert reasons(outcome)["far"] == "top-1 agreement 94.0 % is below the 97.0 % asked for"
    assert "was not measured" in reasons(outcome)["unknown"]
    assert "Agreement: 97.0 % of its likeliest tokens are the unquantized model's." in outcome.reasons
    # The unquantized model agrees with itself, whatever its own precision costs.
    assert recommend(rows, "storage", min_agreement=1.0).choice == "reference"


def test_what_cannot_do_the_wanted_thing_is_never_the_nearest():
    """`loads` could be used if it were smaller; `small` could never be loaded, whatever was allowed."""
    small = make_row("small", tool=LLAMA, bytes=100, kl_mean=0.02)
    loads = make_row("loads", recipe=W4, bytes=490, kl_mean=0.02)
    (told,) = recommend([small, loads], "storage", target="vllm", max_size=200, max_loss=0.1).reasons
    assert re.search(r"loads comes nearest: 490 bytes is 1\d\d\.\d % over", told)
    (told,) = recommend([small], "storage", target="vllm", max_loss=0.1).reasons
    assert "nearest" not in told
    assert "None of them loads in vllm; quern writes such in format awq or compressed-tensors or gptq" in told
    (told,) = recommend([small], "storage", target="openvino", max_loss=0.1).reasons
    assert "None of them loads in openvino; another tool has to make one" in told
    (told,) = recommend([loads], "storage", licences=["MIT", "ISC"], max_loss=0.1).reasons
    assert "nearest" not in told
    assert "None of them was made by a tool under MIT or ISC" in told
    unknown = loads.model_copy(update={"decode_tokens_per_s": None})
    (told,) = recommend([unknown], "storage", min_speed=5.0, max_loss=0.1).reasons
    assert "nearest" not in told
    assert "measure its speed" in told


def test_the_nearest_row_misses_the_agreement_by_the_fewest_doublings():
    rows = [make_row("a", top1_agreement=0.90), make_row("b", top1_agreement=0.95, bytes=900)]
    outcome = recommend(rows, "storage", min_agreement=0.99)
    assert outcome.choice is None
    assert "b comes nearest" in outcome.reasons[0]


def test_target_runtime():
    outcome = recommend(sample_tool_results(), "overall", target="vllm", max_loss=10.0)
    assert all(name.split("-")[0] not in ("llama.cpp", "onnxruntime", "openvino") for name in ranked(outcome))
    assert "does not load in vllm; it loads in llama.cpp" in reasons(outcome)["llama.cpp-q4_k_m"]
    assert "does not load in vllm; it loads in quern, transformers" in reasons(outcome)["balanced"]
    assert recommend(sample_tool_results(), "overall", target="llama.cpp").choice == "llama.cpp-q4_k_m"


def test_a_runtime_that_was_not_measured_is_told():
    loads = HQQ.model_copy(update={"runtime": "libllama", "targets": ["llama.cpp", "transformers"]})
    rows = [make_row("a", tool=loads), make_row("b", engine="cpu", bytes=510), make_row("c", bytes=520)]
    answer = recommend(rows, "storage", target="transformers", max_loss=1.0)
    assert "were measured in libllama; transformers was not measured" in " ".join(answer.reasons)
    told = {entry.name: entry.reason for entry in [*answer.ranking, *answer.excluded]}
    assert told["a"].endswith("; measured in libllama, transformers was not measured")
    alone = recommend(rows[1:2], "storage", target="transformers").reasons
    assert "measured in quern, engine cpu; transformers was not measured" in " ".join(alone)
    for rows_, target in ((rows[2:], "transformers"), (rows[1:2], "quern"), (rows[:1], "llama.cpp")):
        answer = recommend(rows_, "storage", target=target)
        assert "was not measured" not in " ".join([*answer.reasons, answer.ranking[0].reason])
    assert "was not measured" not in " ".join(recommend(rows, "storage").reasons)


def test_a_target_that_leaves_only_a_large_row_of_small_loss_gets_it():
    large = make_row("large", bytes=1010, kl_mean=0.004, tool=LLAMA)
    rows = [make_reference(), large, make_row("small", bytes=300, kl_mean=0.3, tool=LLAMA)]
    for scenario in ("storage", "speed", "overall"):
        assert recommend(rows, scenario, target="llama.cpp").choice == "large"
    assert recommend(rows, "storage").choice == "reference"


def test_every_runtime_of_the_adapters_is_a_target_that_it_declares():
    for adapter in map(PEERS.get, PEERS.names()):
        tool = LLAMA.model_copy(update={"runtime": adapter.runtime, "targets": list(adapter.targets)})
        assert runtime_target(make_row("a", tool=tool)) in adapter.targets


W4 = {"name": "a", "format": "compressed-tensors"}


@pytest.mark.parametrize(
    ("recipe", "targets"),
    [
        ({"name": "a"}, {"quern", "transformers"}),
        ({"name": "a", "format": "quern"}, {"quern", "transformers"}),
        ({"name": "a", "format": "compressed-tensors"}, {"quern", "transformers", "vllm"}),
        (W4 | {"weights": {"bits": 4, "symmetric": False}}, {"quern", "vllm"}),
        (W4 | {"overrides": [{"pattern": "*.o_proj", "symmetric": False}]}, {"quern", "vllm"}),
        (W4 | {"transforms": [{"method": "hadamard", "random_signs": False}]}, {"quern"}),
        (W4 | {"weights": {"bits": 3}}, {"quern", "transformers"}),
        (W4 | {"weights": INT8, "activations": {"mode": "dynamic"}}, {"quern", "transformers", "vllm"}),
        (W4 | {"activations": {"mode": "dynamic"}}, {"quern", "transformers"}),
        (W4 | {"weights": {"codec": "from another version"}, "more": 1}, {"quern"}),
        (None, {"quern", "transformers", "vllm"}),
    ],
)
def test_what_loads_our_own_formats(recipe, targets):
    assert set(targets_of(make_row("a", recipe=recipe))) == targets


def test_a_row_that_a_runtime_does_not_run_says_why():
    asymmetric = make_row("a", recipe=W4 | {"weights": {"bits": 4, "symmetric": False}})
    outcome = recommend([make_reference(), asymmetric], "storage", target="transformers", max_loss=10.0)
    assert "a" not in [entry.name for entry in outcome.ranking]
    assert re.search(
        r"does not load in transformers; .*asymmetric weights only by .*dequantize=True", reasons(outcome)["a"]
    )


def test_licence():
    results = sample_tool_results()
    outcome = recommend(results, "overall", licences=["apache-2.0"])
    assert outcome.choice == "balanced", "quern is Apache-2.0"
    assert reasons(outcome)["bitsandbytes-nf4"] == "its tool's licence is MIT; allowed: apache-2.0"
    only = recommend(results, "overall", licences=["MIT"])
    assert ranked(only) <= {"reference", *(row.name for row in results.rows if row.tool and row.tool.licence == "MIT")}
    assert "its tool's licence is Apache-2.0; allowed: MIT" in reasons(only)["balanced"]


def test_licence_and_maker():
    assert licence_of(make_reference()) is None
    assert licence_of(make_row("a")) == "Apache-2.0"
    assert licence_of(make_row("a", tool=LLAMA)) == "MIT"
    assert maker_of(make_reference(), "1.2") is None
    assert maker_of(make_row("a"), "1.2") == ("quern", "1.2")
    assert maker_of(make_row("a", tool=HQQ), "1.2") == ("HQQ", "0.2.8")


def test_the_choice_says_who_made_it_and_what_disturbed_it():
    rows = [make_row("a", tool=LLAMA, foreign_load=0.62), make_row("b", tool=HQQ, bytes=700, foreign_load=0.2)]
    told = " ".join(recommend(rows, "storage").reasons)
    assert "Made by llama.cpp 0.3.36 (MIT), measured in llama.cpp; loads in llama.cpp." in told
    assert "other programs kept 0.62 processors busy" in told
    assert "uncertain" not in " ".join(recommend(rows[1:], "storage").reasons)


def test_mix_is_the_weighted_sum():
    rows = [make_reference(), make_row("half", bytes=250, kl_mean=0.03, decode_tokens_per_s=200.0)]
    loss = math.log2(1 + 0.03 / math.log(20.0)) / SCALING_EXPONENT
    outcome = recommend(rows, "mix", weights={"size": 1, "speed": 2, "loss": 1})
    assert outcome.weights == {"size": 0.25, "speed": 0.5, "loss": 0.25}
    assert outcome.ranking[0].score == pytest.approx((2 + 2 * 0.5 - loss) / 4, abs=1e-12)
    assert "Score 1/4 x 2.00 + 1/2 x 0.50 - 1/4 x 0.19 = +0.70" in outcome.ranking[0].reason
    assert any("1/2 of the doublings of speed" in reason for reason in outcome.reasons)


def test_mix_of_equal_parts_is_balanced():
    mix, balanced = (
        recommend(sample_rows(), "mix", weights={"loss": 7, "size": 7, "speed": 7}),
        recommend(sample_rows(), "overall"),
    )
    assert [entry.name for entry in mix.ranking] == [entry.name for entry in balanced.ranking]
    assert [entry.score for entry in mix.ranking] == pytest.approx([entry.score for entry in balanced.ranking])


def test_what_counts_nothing_is_not_in_the_score():
    only_size = recommend(sample_rows(), "mix", weights={"size": 1})
    assert only_size.ranking[0].name == "compact", "the ceiling of the loss holds all the same"
    assert only_size.ranking[0].reason.endswith("Score 1 x 2.33 = +2.33")
    only_loss = recommend(sample_rows(), "mix", weights={"loss": 3})
    assert only_loss.ranking[0].name == "reference"
    assert any("Score - 1 x " in entry.reason for entry in only_loss.ranking)
    assert "Score = - 1 of" in only_loss.reasons[-1]
    odd = recommend(sample_rows(), "mix", weights={"size": 0.37, "loss": 0.63})
    assert "0.37 x 1.83 - 0.63 x" in odd.ranking[0].reason


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"price": 1}, "unknown weight 'price'"),
        ({}, "got none"),
        ({"size": 0}, "got size=0"),
        ({"size": 2, "speed": -1}, "at least 0"),
        ({"size": math.nan}, "finite"),
        ({"size": math.inf}, "finite"),
    ],
)
def test_weights_that_are_none_are_refused(weights, said):
    with pytest.raises(UserError, match=said):
        recommend(sample_rows(), "mix", weights=weights)


def test_weights_go_with_mix_and_only_with_it():
    with pytest.raises(UserError, match="needs weights"):
        recommend(sample_rows(), "mix")
    with pytest.raises(UserError, match="brings its own weights"):
        recommend(sample_rows(), "speed", weights={"size": 1})


def test_weights_of_the_scenarios_are_kept_in_the_answer():
    answer = recommend(sample_rows(), "storage")
    assert answer.weights == pytest.approx({"size": 2 / 3, "speed": 0, "loss": 1 / 3})
    assert Recommendation.model_validate_json(answer.model_dump_json()) == answer
    assert Weights.mix({"size": 3, "loss": 1}) == Weights(size=0.75, speed=0, loss=0.25)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_memory": 0},
        {"max_memory": math.nan},
        {"context": 4096},
        {"max_memory": 2_000_000, "context": 0},
        {"min_agreement": -0.1},
        {"min_agreement": 1.1},
        {"min_agreement": math.nan},
        {"target": "excel"},
        {"licences": []},
        {"licences": ["MIT", " "]},
    ],
)
def test_limits_that_are_none_are_refused(limits):
    with pytest.raises(UserError):
        recommend(sample_rows(), "storage", **limits)

"""Recipe and names make a plan: an exact map from full name to what a matrix becomes."""

import pytest
from artifacts import INT8, small_recipe

from quern.core.errors import UserError
from quern.core.plan import KEPT, make_plan, plan_for
from quern.core.recipe import parse_recipe
from quern.core.scheme import UNQUANTIZED, parse_scheme

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
ROTATED = {"transforms": [{"method": "hadamard"}]}


def test_every_matrix_has_a_plan_outer_ones_first():
    recipe = small_recipe(weights={"bits": 3}, head={"bits": 8}, rounding={"method": "gptq"}, **ROTATED)
    plan = make_plan(recipe, [Q, DOWN], "model.embed_tokens", "lm_head")
    assert list(plan) == ["model.embed_tokens", "lm_head", Q, DOWN]
    assert list(plan.quantized()) == ["lm_head", Q, DOWN]
    assert plan["lm_head"].rounding.method == "nearest", "no statistics reach beyond the blocks"
    assert plan["lm_head"].rotation is None
    assert (plan[Q].rounding, plan[Q].rotation) == (recipe.rounding, recipe.transforms[0])
    assert list(make_plan(recipe, [Q], "model.embed_tokens", None)) == ["model.embed_tokens", Q]


def test_overrides_change_what_they_say_and_nothing_else():
    recipe = small_recipe(
        weights={"bits": 3, "group_size": 32},
        rounding={"method": "gptq"},
        overrides=[
            {"pattern": "*.down_proj", "rounding": {"method": "nearest"}},
            {"pattern": "*.q_proj", "rotated": False},
            {"pattern": "*.q_proj", "bits": 8, "granularity": "channel", "activations": {"mode": "dynamic"}},
            {"pattern": "*.k_proj", "codec": "none"},
        ],
        **ROTATED,
    )
    down, query = plan_for(recipe, DOWN), plan_for(recipe, Q)
    assert down.scheme == recipe.weights == parse_scheme({"bits": 3, "group_size": 32})
    assert (down.rounding.method, down.rotation, down.activations.mode) == ("nearest", recipe.transforms[0], "none")
    assert (query.scheme.params.bits, query.rounding, query.rotation) == (8, recipe.rounding, None)
    assert query.activations.mode == "dynamic"
    assert plan_for(recipe, "model.layers.0.self_attn.k_proj") is KEPT
    assert parse_recipe(recipe.to_json(), "again") == recipe, "an override without a scheme does not get one on the way"


def test_the_last_override_counts_whether_it_names_a_linear_or_many():
    """Names are looked up and patterns are tried; their order stays that of the recipe."""
    named, pattern = {"pattern": Q, "bits": 3, "group_size": 32}, {"pattern": "*.q_proj", "bits": 5, "group_size": 32}
    for overrides in ([named, pattern], [pattern, named], [named, pattern, named], [pattern, named, pattern]):
        recipe = small_recipe(overrides=overrides)
        assert plan_for(recipe, Q).scheme.params.bits == overrides[-1]["bits"]
        assert plan_for(recipe, Q.replace("0", "1")).scheme.params.bits == 5
        assert plan_for(recipe, DOWN).scheme == recipe.weights
        assert [one.matches_any({Q: 1}) for one in recipe.overrides] == [True] * len(overrides)
        assert not any(one.matches_any([DOWN]) for one in recipe.overrides)


def test_what_one_override_needs_the_recipe_calibrates_for():
    assert not small_recipe().needs_calibration
    assert small_recipe(overrides=[{"pattern": "*", "rounding": {"method": "gptq"}}]).needs_calibration
    static = {"pattern": "*.q_proj", **INT8, "activations": {"mode": "static"}}
    assert small_recipe(overrides=[static]).needs_calibration


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ({"rotated": True}, "is to be rotated, but the recipe has no transform that rotates"),
        (
            {"symmetric": False, "activations": {"mode": "dynamic"}},
            r"int8 activations need symmetric integer weights; \* asks for symmetric: False",
        ),
        ({"codec": "trellis", "activations": {"mode": "dynamic"}}, "names a codec that stores no int8 numbers"),
        (
            {"activations": {"mode": "dynamic", "granularity": "group"}},
            "group_size of activations goes with granularity",
        ),
        ({"activations": {"mode": "dynamic", "group_size": 32}}, "group_size of activations goes with granularity"),
        (
            {"activations": {"mode": "static", "granularity": "token"}},
            "activations take granularity token or group with",
        ),
        (
            {"activations": {"mode": "dynamic", "granularity": "tensor"}},
            "activations take granularity token or group with",
        ),
        (
            {"group_size": 64, "activations": {"mode": "dynamic", "granularity": "group", "group_size": 32}},
            "groups of 32 int8 activations need weights that fit them; .* asks for groups of 64",
        ),
        ({"rounding": {"methd": "nearest"}}, r"overrides\.0\.rounding\.methd: unknown key.*did you mean 'method'"),
        (
            {"bit": 4},
            r"overrides\.0\.bit: unknown key; known keys here: pattern, rounding, rotated, activations, codec, bits",
        ),
        ({"scheme": {"codec": "trellis", "zap": 1}}, r"overrides\.0\.zap: unknown key"),
    ],
)
def test_overrides_that_cannot_be_meant_are_refused(override, match):
    with pytest.raises(UserError, match=match):
        small_recipe(overrides=[{"pattern": "*", **override}])


def test_scales_that_got_another_dtype_change_the_plan_of_their_module_alone():
    plan = make_plan(small_recipe(), [Q, DOWN], "model.embed_tokens", None)
    changed = plan.changed({DOWN: "bfloat16"})
    assert (changed[DOWN].scheme.params.scale_dtype, changed[Q]) == ("bfloat16", plan[Q])


@pytest.mark.parametrize("values", [7, "integer", None, []])
def test_a_scheme_is_a_set_of_keys(values):
    with pytest.raises(UserError, match="a weight scheme is a set of keys"):
        small_recipe(weights=values)


def test_beside_codec_none_no_key_means_anything():
    assert parse_scheme({"codec": "none", "bits": 8, "group_size": None}) == UNQUANTIZED, "as older versions wrote it"
    with pytest.raises(UserError, match=r"unknown codec 'zap'; known: float8, ggml, integer, kmeans, .*trellis"):
        small_recipe(weights={"codec": "zap"})
    with pytest.raises(UserError, match="codec must be a name"):
        small_recipe(weights={"codec": 4})


@pytest.mark.parametrize(("mode", "usual"), [("dynamic", "token"), ("static", "tensor")])
def test_saying_the_usual_granularity_of_activations_is_saying_nothing(mode, usual):
    plain, said = ({"mode": mode}, {"mode": mode, "granularity": usual})
    recipes = [small_recipe(weights=INT8, activations=activations) for activations in (plain, said)]
    assert recipes[0] == recipes[1]
    assert recipes[0].to_json()["activations"] == {"mode": mode, "observer": "min_max"}


def test_groups_of_activations_come_back_from_json():
    activations = {"mode": "dynamic", "granularity": "group", "group_size": 32}
    recipe = small_recipe(weights={"bits": 4, "group_size": 32}, activations=activations)
    assert recipe.to_json()["activations"] == {**activations, "observer": "min_max"}
    assert parse_recipe(recipe.to_json(), "x") == recipe

"""Recipe files that are not what they should be: refused by name, whatever is wrong with them."""

import pytest

from quern.core.errors import UserError
from quern.core.recipe import load_recipe


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.yaml", "", "is empty. It needs at least a name"),
        ("a.json", "5", "is not a set of keys but a int"),
        ("a.yaml", "- name: a", "is not a set of keys but a list"),
        ("a.yaml", "[", "is neither YAML nor JSON"),
        ("a.yaml", "name: 2026-99-99", "is neither YAML nor JSON: month must be in 1..12"),
        ("a.yaml", "name: a\nname: b", "it names 'name' twice"),
        ("a.yaml", "name: a\nweights: {bits: 4, bits: 2}", "it names 'bits' twice"),
        ("a.json", '{"name": "a", "weights": {"bits": 4, "bits": 2}}', "it names 'bits' twice"),
        ("a.yaml", "? [a]\n: b", "is neither YAML nor JSON"),
        ("a.yaml", "a: !!python/object:os.system x", "is neither YAML nor JSON"),
        ("a.json", '{"name": "a", "weights": {"bits": ' + "9" * 5000 + "}}", "is neither YAML nor JSON"),
        ("a.yaml", "name: a\nweights: {bits: " + "9" * 5000 + "}", "is neither YAML nor JSON"),
        ("a.json", "[" * 100_000, "is nested too deeply"),
        ("a.yaml", "[" * 3000 + "]" * 3000, "is nested too deeply"),
    ],
)
def test_what_is_refused(tmp_path, name, content, problem):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=problem) as caught:
        load_recipe(tmp_path / name)
    assert name in str(caught.value)


def test_keys_that_a_merge_brings_may_be_replaced(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "name: a\nweights: &base {bits: 4, granularity: channel}\nhead: {<<: *base, bits: 8}\n"
    )
    recipe = load_recipe(tmp_path / "a.yaml")
    assert recipe.head is not None
    assert (recipe.weights.params.bits, recipe.head.params.bits, recipe.head.params.granularity) == (4, 8, "channel")

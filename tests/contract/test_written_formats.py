"""What every format promises that quern writes and does not open."""

import pytest
from artifacts import small_recipe

import quern
from quern.core.errors import UserError
from quern.engines.base import ENGINES
from quern.formats.base import FORMATS, runtimes_of
from quern.pipeline.inspect import inspect
from quern.pipeline.quantize import quantize


@pytest.mark.parametrize("name", [name for name in FORMATS.names() if not FORMATS.get(name).opened])
def test_what_quern_only_writes_is_refused_by_all_that_would_open_it(name, tiny_model, tmp_path):
    """Engines by the recipe before any work, commands by the artifact, each with what to do instead."""
    recipe = small_recipe(format=name, weights={"bits": 4, "group_size": 32})
    assert "quern" not in runtimes_of(recipe)
    for engine in ENGINES.names():
        assert f"writes the format {name} and does not open it" in ENGINES.get(engine)().supports(recipe)
    report = quantize(tiny_model, tmp_path / "out", recipe=recipe, threads=1)
    assert 0 < report.bits_per_weight < 8 * report.bytes / 1e4
    for opening in (lambda: inspect(report.path), lambda: ENGINES.get("reference")().load(report.path)):
        with pytest.raises(UserError, match="which is not read"):
            opening()
    for using in (quern.train, lambda *where, recipe: quern.compare(*where, recipes=[recipe])):
        with pytest.raises(UserError, match=f"quern does not open format {name} .* quern export writes {name}"):
            using(tiny_model, tmp_path / "x", recipe=recipe)

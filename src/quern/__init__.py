"""quern: quantize large language models, measure what it cost, learn which result to use.

The functions of the command line, for Python. They are imported when first used: ``import quern`` loads neither torch
nor transformers.
"""

import importlib
from typing import TYPE_CHECKING

from quern.engines import transformers_hook

if TYPE_CHECKING:
    from quern.advisor.hardware import probe
    from quern.advisor.recommend import recommend
    from quern.core.recipe import Recipe, load_recipe
    from quern.core.results import load_results
    from quern.generation.chat import Chat
    from quern.generation.generate import generate
    from quern.pipeline.compare import compare
    from quern.pipeline.evaluate import evaluate
    from quern.pipeline.export import export
    from quern.pipeline.forecasting.forecast import forecast
    from quern.pipeline.forecasting.placement import place
    from quern.pipeline.inspect import inspect
    from quern.pipeline.planning.plan import plan
    from quern.pipeline.quantize import quantize
    from quern.pipeline.stacking.check import check
    from quern.pipeline.status import status
    from quern.pipeline.train import train
    from quern.pipeline.writing.write_text import write_text
    from quern.quantization.ray_workers import ray_cluster
    from quern.report.html import write_report

__version__ = "0.1.0"

__all__ = [
    "Chat",
    "Recipe",
    "__version__",
    "check",
    "compare",
    "evaluate",
    "export",
    "forecast",
    "generate",
    "inspect",
    "load_recipe",
    "load_results",
    "place",
    "plan",
    "probe",
    "quantize",
    "ray_cluster",
    "recommend",
    "status",
    "train",
    "write_report",
    "write_text",
]

_HOMES = {
    "Chat": "quern.generation.chat",
    "Recipe": "quern.core.recipe",
    "check": "quern.pipeline.stacking.check",
    "compare": "quern.pipeline.compare",
    "evaluate": "quern.pipeline.evaluate",
    "export": "quern.pipeline.export",
    "forecast": "quern.pipeline.forecasting.forecast",
    "generate": "quern.generation.generate",
    "inspect": "quern.pipeline.inspect",
    "load_recipe": "quern.core.recipe",
    "load_results": "quern.core.results",
    "place": "quern.pipeline.forecasting.placement",
    "plan": "quern.pipeline.planning.plan",
    "probe": "quern.advisor.hardware",
    "quantize": "quern.pipeline.quantize",
    "ray_cluster": "quern.quantization.ray_workers",
    "recommend": "quern.advisor.recommend",
    "status": "quern.pipeline.status",
    "train": "quern.pipeline.train",
    "write_report": "quern.report.html",
    "write_text": "quern.pipeline.writing.write_text",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'quern' has no attribute {name!r}; it has {', '.join(__all__)}")
    value: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


transformers_hook.install()

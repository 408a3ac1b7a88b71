"""Makes vLLM load quern's artifacts: what the entry point ``vllm.general_plugins`` of pyproject.toml names."""

from __future__ import annotations


def register() -> None:
    """Tell vLLM, which calls this in each of its processes."""
    from quern.engines import _vllm_plugin

    _vllm_plugin.register()

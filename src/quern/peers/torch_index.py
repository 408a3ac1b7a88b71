"""Where torch without CUDA is found. On Linux, PyPI's own wheels bring gigabytes for GPUs.

Standard library only: ``make`` runs this before anything is installed (``tools/install_torch.py``).
"""

from __future__ import annotations

import sys
import threading
import urllib.request

CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
"""PyTorch's own index of wheels without CUDA."""
PATIENCE_S = 6.0
"""An index that has not answered by then is done without: pip would try it again and again."""


def cpu_build(requirement: str) -> str:
    """``torch==2.13.0`` as ``torch==2.13.0+cpu`` where builds differ, on Linux; there are no others elsewhere."""
    return f"{requirement}+cpu" if sys.platform == "linux" and "+" not in requirement else requirement


def index_options(url: str = CPU_WHEELS) -> list[str]:
    """pip's options for a further index, none if it cannot be reached: then the configured ones may have the wheel."""
    return ["--extra-index-url", url] if _answers(f"{url}/torch/") else []


def _answers(url: str) -> bool:
    answered = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE_S) as response:
                answered.append(response.status)
        except (OSError, ValueError):
            pass

    # A thread, because looking up the name has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return bool(answered)

"""What the bytes of an artifact depend on beside the job: whose arithmetic it is."""

from __future__ import annotations

import torch

from quern import _native


def arithmetic() -> dict[str, str]:
    """``torch``: its version; ``torch_instruction_set`` and ``kernels_instruction_set``: what torch and the native
    kernels compute with here (``AVX512``, ``avx2``, ...).

    Another version, and other instructions, add in another order: a job that goes on with them would make an artifact
    that neither would have made alone.
    """
    return {
        "torch": torch.__version__,
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "kernels_instruction_set": _native.isa(),
    }

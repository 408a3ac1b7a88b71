"""Installs torch into the environment that runs this: the version of requirements/torch.txt, without CUDA.

    python tools/install_torch.py [--torch torch==2.13.0] [--index URL]

``--torch`` names another build or version (its own dependencies come with it, those of a CUDA build are gigabytes),
``--index`` another index of wheels without CUDA than PyTorch's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src/quern/peers"))  # the package itself needs what is not installed yet

import torch_index  # noqa: E402


def pinned() -> str:
    """The requirement in requirements/torch.txt."""
    lines = (ROOT / "requirements/torch.txt").read_text("utf-8").splitlines()
    (found,) = [line for line in lines if line and not line.startswith("#")]
    return found


def pip_command(torch: str, index: str) -> list[str]:
    """What is run. Nothing comes with the pinned torch: what it depends on is in the lock."""
    options = ["--extra-index-url", index] if index else torch_index.index_options()
    wanted = [torch] if torch else ["--no-deps", torch_index.cpu_build(pinned())]
    return [sys.executable, "-m", "pip", "--quiet", "--quiet", "install", *options, *wanted]


def main() -> int:
    """Install it; 1 and what can be done if that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="", help="requirement to install instead")
    parser.add_argument("--index", default="", help="URL of an index with wheels without CUDA")
    arguments = parser.parse_args()
    command = pip_command(arguments.torch, arguments.index)
    if subprocess.run(command).returncode == 0:
        return 0
    asked = "" if "--extra-index-url" in command else f"; {torch_index.CPU_WHEELS} does not answer"
    print(
        f"error: {command[-1]} could not be installed from the indexes that pip knows{asked}. Give another index of "
        "wheels without CUDA: make TORCH_INDEX=URL ... Or take PyPI's build, on Linux gigabytes for GPUs: "
        f"make TORCH={pinned()} ...",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())

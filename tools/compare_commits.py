"""Do two commits make the same bytes?   usage: compare_commits.py OLD NEW [--quick] [--no-evaluation] [--only RECIPE ...]

OLD and NEW are anything that git can check out; ``.`` is the working tree as it is. Both are laid beside each other and
compiled, and quantize the same models: the bundled one and a tiny random one of every family, by every shipped recipe and
every recipe of benchmarks/recipes (those of OLD), in both formats. Compared are the bytes of every tensor, the logits of
both engines bit by bit, what is refused, and the report's numbers (rounding errors, bits per weight, and for the shipped
recipes KL divergence, perplexity and agreement). Bytes depend on the processor and on torch: so it takes two commits on one
machine, and hashes that were stored would not do.

Exit code 0: equal. 1: not; each difference is a line. Files beside the tensors (config.json, provenance) are named where
they differ and fail nothing, because formats may grow.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("old", "new")
MAKE = "--make"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
FORMATS = ("quern", "compressed-tensors")
ENGINES = ("cpu", "reference")
NATIVE = ("csrc", "CMakeLists.txt", "pyproject.toml")
NUMBERS = ("bits_per_weight", "kl_mean", "kl_ci95", "kl_noise_floor", "perplexity", "top1_agreement")
RUN_TOKENS, SCORED_TOKENS = 96, 512


def main() -> int:
    """The command; with ``MAKE`` first, its work inside one commit's environment."""
    if sys.argv[1:2] == [MAKE]:
        make(*sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--quick", action="store_true", help="the tiny models only")
    parser.add_argument("--no-evaluation", action="store_true", help="bytes and logits only, which takes half the time")
    parser.add_argument("--only", nargs="*", default=[], metavar="RECIPE", help="these recipes only")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work here and leave everything")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quern-compare-") as scratch:
        folder = (options.keep or Path(scratch)).resolve()
        trees = [lay_out(revision, folder / side) for revision, side in zip((options.old, options.new), SIDES)]
        compile_native(trees)
        jobs = list(plan(folder, trees[0], options.quick, options.only, not options.no_evaluation))
        (folder / "jobs.json").write_text(json.dumps(jobs), "utf-8")
        make_both(folder)
        return compare(folder, [job["name"] for job in jobs])


def lay_out(revision: str, folder: Path) -> Path:
    """The files of ``revision`` in a folder of their own, with an environment that imports them."""
    tree = folder / "tree"
    shutil.rmtree(folder, ignore_errors=True)
    tree.mkdir(parents=True)
    if revision == ".":
        for name in run_git("ls-files", "-co", "--exclude-standard", "-z").decode().split("\0"):
            if name and (ROOT / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, tree / name)
    else:
        subprocess.run(["tar", "-x", "-C", str(tree)], input=run_git("archive", revision), check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    # What lies in a folder that a .pth file names is found, but .pth files in it are not followed: an editable
    # installation of the package stays out.
    site = next((folder / "venv" / "lib").glob("python3*")) / "site-packages"
    (site / "compared.pth").write_text(f"{tree / 'src'}\n{sysconfig.get_path('purelib')}\n", "utf-8")
    return tree


def run_git(*arguments: str) -> bytes:
    """What git prints."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout


def compile_native(trees: list[Path]) -> None:
    """The compiled part of all trees; once where they share its sources."""
    built: dict[tuple[bytes, ...], Path] = {}
    for tree in trees:
        files = [path for name in NATIVE for path in (tree / name, *(tree / name).rglob("*")) if path.is_file()]
        sources = tuple(path.read_bytes() for path in sorted(files))
        if sources not in built:
            print(f"compiling {tree.parent.name} ...", flush=True)
            target = tree.parent / "installed"
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, tree]
            subprocess.run([str(word) for word in command], check=True)
            built[sources] = next((target / "quern").glob("_native*.so"))
        shutil.copy(built[sources], tree / "src" / "quern")


def plan(folder: Path, old: Path, quick: bool, only: list[str], evaluated: bool) -> Iterator[dict[str, Any]]:
    """Every model by every recipe in every format."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_model import tiny_config, write_model

    models = {family: write_model(folder / "models" / family, tiny_config(family)) for family in FAMILIES}
    untied = tiny_config("qwen2", tie_word_embeddings=False, intermediate_size=100)
    models["qwen2-untied"] = write_model(folder / "models" / "qwen2-untied", untied, seed=1)
    if not quick:
        models["python-7m"] = ROOT / "models" / "python-7m"
    shipped, more = sorted(old.glob("src/quern/recipes/*.yaml")), sorted(old.glob("benchmarks/recipes/*.yaml"))
    for name, model in models.items():
        for recipe in (*shipped, *more):
            for form in FORMATS:
                if not only or recipe.stem in only:
                    yield {
                        "name": f"{name}.{recipe.stem}.{form}",
                        "model": str(model),
                        "recipe": str(recipe),
                        "format": form,
                        "evaluated": evaluated and recipe in shipped and form == FORMATS[0],
                    }


def make_both(folder: Path) -> None:
    """Both commits at once, each with one thread: the bytes do not depend on it."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    started = []
    for side in SIDES:
        command = [folder / side / "venv/bin/python", __file__, MAKE, folder / "jobs.json", folder / side / "made"]
        started.append(subprocess.Popen([str(word) for word in command], env=environment, cwd=folder / side))
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit("one of the commits failed; its error stands above")


def make(jobs: str, made: str) -> None:
    """Runs inside one commit's environment: every job into a folder of ``made``."""
    from quern.core.errors import QuernError

    for job in json.loads(Path(jobs).read_text("utf-8")):
        folder = Path(made, job["name"])
        folder.mkdir(parents=True)
        try:
            told = make_one(job, folder, Path(made, "cache", Path(job["model"]).name))
        except QuernError as error:
            told = {"refused": str(error)}
        (folder / "told.json").write_text(json.dumps(told, indent=1), "utf-8")
        print(f"{Path(made).parent.name} {job['name']}: {'refused' if 'refused' in told else 'made'}", flush=True)


def make_one(job: dict[str, Any], folder: Path, cache: Path) -> dict[str, Any]:
    """Quantize, run on both engines, and evaluate where that is asked for; the numbers."""
    import numpy as np
    import torch

    import quern
    from quern.core.errors import QuernError
    from quern.engines.base import ENGINES as LOADERS

    artifact = folder / "artifact"
    made = quern.quantize(job["model"], artifact, recipe=job["recipe"], format=job["format"], cache=cache, threads=1)
    told: dict[str, Any] = {
        "layers": [layer.model_dump(exclude_none=True) for layer in made.layers]
    }  # of fields to come
    told["bits_per_weight"] = made.bits_per_weight
    for engine in ENGINES:
        try:
            model = LOADERS.get(engine)().load(artifact, dtype="float32", threads=1)
        except QuernError:
            told[f"{engine} engine"] = "refuses"
            continue
        ids = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, RUN_TOKENS)))
        np.save(folder / f"{engine}.npy", model.logits(ids).numpy())
    if job["evaluated"]:
        row = quern.evaluate(artifact, reference=job["model"], tokens=SCORED_TOKENS, speed_rounds=0, threads=1)
        told["row"] = {key: getattr(row, key) for key in NUMBERS}
    return told


def compare(folder: Path, names: list[str]) -> int:
    """Print what differs; the exit code."""
    counts: Counter[str] = Counter()
    differences: list[str] = []
    beside: set[str] = set()
    for name in names:
        old, new = (folder / side / "made" / name for side in SIDES)
        told = [json.loads((made / "told.json").read_text("utf-8")) for made in (old, new)]
        refused = ["refused" in each for each in told]
        if all(refused):
            counts["refusals"] += 1
            continue
        if any(refused):
            differences.append(
                f"{name}: only {SIDES[refused.index(True)]} refuses: {told[refused.index(True)]['refused']}"
            )
            continue
        counts["artifacts"] += 1
        tensors = [read_tensors(made / "artifact") for made in (old, new)]
        runs = [{path.name: path.read_bytes() for path in made.glob("*.npy")} for made in (old, new)]
        counts["tensors"] += len(tensors[0])
        counts["logits"] += len(runs[0])
        for kind, pair in (("number", told), ("tensor", tensors), ("logits", runs)):
            keys = sorted({*pair[0], *pair[1]})
            differences += [f"{name}: {kind} {key}" for key in keys if pair[0].get(key) != pair[1].get(key)]
        files = [other_files(made / "artifact") for made in (old, new)]
        beside |= {key for key in {*files[0], *files[1]} if files[0].get(key) != files[1].get(key)}
    for line in sorted(beside):
        print(f"beside the tensors: {line} differs")
    for line in differences:
        print(f"DIFFERS {line}")
    print(f"compared {', '.join(f'{count} {kind}' for kind, count in counts.items())}: {len(differences)} differences")
    if not counts["tensors"] or not counts["logits"]:
        print("nothing was compared")
        return 1
    return 1 if differences else 0


def read_tensors(artifact: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of every tensor, over all shards, read without the package that is judged."""
    found = {}
    for shard in sorted(artifact.glob("*.safetensors")):
        raw = shard.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = (entry["dtype"], tuple(entry["shape"]), raw[start + begin : start + end])
    return found


def other_files(artifact: Path) -> dict[str, bytes]:
    """Everything in an artifact but its shards."""
    return {path.name: path.read_bytes() for path in artifact.iterdir() if path.suffix != ".safetensors"}


if __name__ == "__main__":
    sys.exit(main())

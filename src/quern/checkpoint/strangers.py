"""What else a path may be that was meant as a model: adapters, caches, pickles, other formats; each with what to do."""

from __future__ import annotations

from pathlib import Path

from quern.checkpoint.files import read_json
from quern.core.errors import BadFileError, UserError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
CONSOLIDATED = "consolidated"
"""How the names of Mistral's own files begin."""
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model"
_CONVERT = "Convert it where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
_OTHER_FORMATS = {
    ".msgpack": "Flax",
    ".h5": "TensorFlow",
    ".onnx": "ONNX",
    ".tflite": "TensorFlow Lite",
    ".nemo": "NeMo",
}


def what_else(folder: Path, problem: str) -> BadFileError:
    """The error for a folder without a readable checkpoint: ``problem``, what it seems to be, and the next step."""
    if (folder / ADAPTER).is_file():
        return _adapter(folder)
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        if name.lower().endswith(".gguf"):
            return BadFileError(folder, problem, f"It holds {name}: give that file as MODEL")
    if pickle := next(
        (n for n in names if n.endswith((*PICKLES, ".bin.index.json")) and n != "training_args.bin"), None
    ):
        return pickle_refused(folder, pickle)
    if consolidated := next((n for n in names if n.startswith(CONSOLIDATED)), None):
        return BadFileError(
            folder, f"has its weights in {consolidated}, Mistral's own format, whose names and order of rows differ",
            "Get the files of the transformers format too: config.json and model*.safetensors",
        )  # fmt: skip
    for name in names:
        if kind := _OTHER_FORMATS.get(Path(name).suffix.lower()):
            return BadFileError(folder, f"has its weights in {name}, a file of {kind}, which is not read", _CONVERT)
    inner = [path.name for path in sorted(folder.iterdir()) if (path / "config.json").is_file()]
    if inner:
        return BadFileError(folder, problem, f"Its folder {inner[-1]} holds one: give {folder / inner[-1]} as MODEL")
    return BadFileError(
        folder,
        problem,
        "Give a folder with config.json and model.safetensors (or its shards), a Hub id, or a .gguf file",
    )


def _adapter(folder: Path) -> BadFileError:
    config = read_json(folder / ADAPTER)
    base = config.get("base_model_name_or_path")
    kind = str(config.get("peft_type", "")).upper()[:40] or "PEFT"
    base = base if isinstance(base, str) and base.isprintable() and len(base) <= 300 else None
    return BadFileError(
        folder,
        f"is a {kind} adapter of {base or 'a model that it does not name'}, not a model",
        "Merge it into that model, and give the merged folder: PeftModel.from_pretrained("
        f"AutoModelForCausalLM.from_pretrained({base or 'BASE'!r}), {str(folder)!r}).merge_and_unload()"
        ".save_pretrained(NEW_FOLDER), with the package peft",
    )


def pickle_refused(path: Path, name: str) -> BadFileError:
    """The error for weights in the pickle called ``name``."""
    return BadFileError(
        path,
        f"has its weights in {name}, a pickle, which can run any code when it is read, so quern does not",
        _CONVERT,
    )


def cached_snapshot(folder: Path) -> Path | None:
    """The model in a cache folder of the Hub's client (``models--Organization--Name``); None for any other folder.

    Raises ``UserError`` where several snapshots lie there and none is the main one, or where there is none.
    """
    snapshots = folder / "snapshots"
    if (folder / "config.json").exists() or not snapshots.is_dir():
        return None
    main = folder / "refs" / "main"
    if main.is_file() and main.stat().st_size <= 200:
        commit = main.read_text("utf-8", errors="replace").strip()
        if commit and Path(commit).name == commit and (snapshots / commit).is_dir():
            return snapshots / commit
    found = sorted(path for path in snapshots.iterdir() if path.is_dir())
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{folder} is a cache of the Hugging Face Hub without a snapshot. Download the model again")
    raise UserError(
        f"{folder} is a cache of the Hugging Face Hub with {len(found)} snapshots. Give one of them as MODEL: "
        f"{', '.join(map(str, found[:5]))}"
    )


def single_file(path: Path, allowed: str) -> UserError:
    """The error for a file that is no model by itself."""
    if path.suffix.lower() in PICKLES:
        return pickle_refused(path, path.name)
    if path.suffix.lower() in (".safetensors", ".json"):
        return UserError(
            f"MODEL {path} is one file of a model. Give the folder that it lies in: {path.absolute().parent}"
        )
    return UserError(f"MODEL {path} is a file of another kind. {allowed}")

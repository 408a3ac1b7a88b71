"""Convert a Hugging Face folder to GGUF with llama.cpp's own converter: ``python llama_convert.py TREE MODEL OUTPUT``.

Run in the environment of llama.cpp; ``TREE`` holds its ``convert_hf_to_gguf.py``. The converter recognizes a tokenizer's
pre-tokenizer by a hash of what it does to one text, which depends on the vocabulary: a vocabulary that llama.cpp's makers
have never seen is refused, although its pre-tokenizer may be a usual one. Here it is then recognized by what
``tokenizer.json`` says, and the last resort is llama.cpp's default one. The choice decides how llama.cpp cuts text
into tokens; the weights do not depend on it. It is printed as ``pre-tokenizer: NAME``, only if the hash was unknown.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern that llama.cpp calls ``qwen2``."""
ANNOUNCEMENT = "pre-tokenizer: "


def pre_tokenizer_of(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer that ``tokenizer.json`` describes; ``default`` if it has none."""
    described = tokenizer.get("pre_tokenizer") or {}
    steps = described.get("pretokenizers", [described])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    kinds = [step.get("type") for step in steps]
    if patterns == [QWEN2]:
        return "qwen2"
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    return "default"


def main(tree: str, model: str, output: str) -> None:
    """Convert, in the 16-bit type that the checkpoint has."""
    sys.path.insert(0, tree)
    import convert_hf_to_gguf  # type: ignore[import-not-found]
    from conversion.base import TextModel  # type: ignore[import-not-found]

    recognize = TextModel.get_vocab_base_pre

    def recognize_or_read(self: Any, tokenizer: Any) -> str:
        try:
            return str(recognize(self, tokenizer))
        except NotImplementedError:
            name = pre_tokenizer_of(json.loads((Path(model) / "tokenizer.json").read_text("utf-8")))
            print(f"{ANNOUNCEMENT}{name}", flush=True)
            return name

    TextModel.get_vocab_base_pre = recognize_or_read
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", output, "--outtype", "auto"]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main(*sys.argv[1:])

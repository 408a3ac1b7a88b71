"""vLLM on folders: ``python vllm_judge.py REQUEST.json [QUERN]``, run in vLLM's own environment, which need not have quern.
With ``QUERN``, the folder of quern's package, its plug-in for format quern is registered.

The request has ``folders``, token numbers ``ids`` (texts), ``greedy`` (tokens to generate) and ``top`` (candidates of which
log-probabilities are asked at each position). Beside each folder comes ``NAME.vllm.json``: ``error`` (one line), or ``tokens``
(the greedy ones after the first text), and of each text ``logprobs`` of its tokens from the second on, and ``top``, at each of
these positions the most likely tokens and their log-probabilities. Each folder has a process of its own, because a failed load
spoils later ones.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_INT4_W4A8": "0",  # or 4-bit weights meet 8-bit activations where the processor has AMX
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}


def main(request: str, quern: str | None = None) -> None:
    os.environ.update(SETTINGS)
    asked = json.loads(Path(request).read_text("utf-8"))
    import vllm  # noqa: F401 - once, and the processes of the folders have it

    if quern is not None:
        sys.path.append(str(Path(quern).parent))
        from quern.engines.vllm_hook import register

        register()
    forking = multiprocessing.get_context("fork")
    for folder in asked["folders"]:
        process = forking.Process(target=answer, args=(folder, asked))
        process.start()
        process.join()
        if process.exitcode:
            write(folder, {"error": f"ended with {process.exitcode}"})


def answer(folder: str, asked: dict[str, Any]) -> None:
    try:
        said = judged(folder, asked)
    except Exception as error:  # whatever vLLM says is the answer
        said = {"error": " ".join((str(error).strip() or repr(error)).split())[:300]}
    write(folder, said)
    os._exit(0)  # vLLM's own threads would keep the process


def judged(folder: str, asked: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    texts, top = asked["ids"], asked["top"]
    model = LLM(
        folder, dtype=asked.get("dtype", "bfloat16"), max_model_len=1024, enforce_eager=True, max_logprobs=top,
        enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip
    settings = SamplingParams(temperature=0, max_tokens=asked["greedy"], prompt_logprobs=top, ignore_eos=True)
    found = model.generate([{"prompt_token_ids": ids} for ids in texts], settings, use_tqdm=False)
    said: dict[str, Any] = {"tokens": list(found[0].outputs[0].token_ids), "logprobs": [], "top": []}
    for ids, one in zip(texts, found, strict=True):
        places = [{token: entry.logprob for token, entry in place.items()} for place in one.prompt_logprobs[1:]]
        said["logprobs"].append([place[token] for token, place in zip(ids[1:], places, strict=True)])
        said["top"].append([sorted(place.items(), key=lambda entry: -entry[1])[:top] for place in places])
    return said


def write(folder: str, said: dict[str, Any]) -> None:
    Path(f"{folder}.vllm.json").write_text(json.dumps(said), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The process of one adapter, in its tool's environment; ``boot.py`` starts it.

One line of JSON on stdin is a request, one line on stdout its answer; ``quern.evaluation.worker`` describes them. Beside
measuring, it answers:

- ``quantize``: ``model``, ``output`` (folders), ``variant`` (object), ``sequences`` (file of token ids, .npy), ``text``
  (file), ``threads``, ``seed`` -> ``seconds``, ``peak_rss_bytes``, ``notes``
- ``versions``: imports the tool -> ``version`` of the tool and ``versions`` of everything that is installed beside it
"""

from __future__ import annotations

import importlib.metadata
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from quern.core.engine import LoadedModel
from quern.core.errors import UserError
from quern.core.machine.parallel import available_threads
from quern.evaluation.peak_memory import peak_rss_bytes
from quern.evaluation.worker import Answer, serve
from quern.peers.base import PEERS, Peer, ToolJob, Variant


def main(name: str) -> None:
    """Answer requests for the peer called ``name``."""
    peer = PEERS.get(name)()
    more = {
        "quantize": lambda **request: _quantize(peer, **request),
        "versions": lambda: _versions(peer),
    }
    serve(lambda path, *, threads: _load(peer, path, threads), more)


def _load(peer: Peer, path: str, threads: int | None) -> LoadedModel:
    import torch

    threads = threads or available_threads()
    torch.set_num_threads(threads)
    return peer.load(Path(path), threads)


def _quantize(
    peer: Peer, model: str, output: str, variant: dict[str, Any], sequences: str, text: str, threads: int, seed: int
) -> Answer:
    import torch

    torch.manual_seed(seed)
    np.random.seed(seed)  # the tools draw from it
    torch.set_num_threads(threads)
    job = ToolJob(
        model=Path(model),
        output=Path(output),
        variant=Variant(**variant),
        sequences=np.load(sequences, allow_pickle=False),
        text=Path(text),
        threads=threads,
        seed=seed,
    )
    start = time.perf_counter()
    notes = peer.quantize(job)
    return {
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": peak_rss_bytes(),
        "notes": list(notes),
    }


def _versions(peer: Peer) -> Answer:
    """Raises ``UserError`` where the tool cannot be imported."""
    # Before the import: setuptools, which some tools import, adds distributions of its own to what is found.
    versions = _installed()
    try:
        version = importlib.metadata.version(peer.package)
        peer.start()
    except Exception as error:
        traceback.print_exc()
        reason = " ".join(str(error).split())
        raise UserError(f"{peer.tool} cannot be imported: {type(error).__name__}: {reason}") from None
    return {"version": version, "versions": versions}


def _installed() -> dict[str, str]:
    """Versions of all distributions by name; of several with one name, the one that an import finds."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        found.setdefault(distribution.metadata["Name"], distribution.version)
    return dict(sorted(found.items()))

"""Every malformed checkpoint is refused: with the file's name, before anything large is allocated."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch
from bad_files import corpus
from bad_files.gguf_cases import ALL
from bad_files.split_cases import CASES as SPLIT
from bad_files.split_cases import good_split

from quern.checkpoint import safetensors_file
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.gguf import file as gguf_file
from quern.checkpoint.tokenizer import load_tokenizer
from quern.core.errors import UserError
from quern.loading.fitting import open_original

CASES = (*ALL, *SPLIT)
MOST_BYTES = 4 * 1024 * 1024


def use(model: Path) -> Checkpoint:
    """What quantization does to a checkpoint before it computes anything."""
    checkpoint = open_original(model)
    for name in checkpoint.names():
        checkpoint.read(name, finite=True)
    if checkpoint.path.is_dir():
        load_tokenizer(checkpoint.path)
    return checkpoint


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """Imports and caches of the libraries are not what the limits are about."""
    use(corpus.good_folder(tmp_path_factory.mktemp("warm") / "model"))


def test_the_originals_are_good(tmp_path):
    use(corpus.good_folder(tmp_path / "single"))
    use(corpus.sharded_folder(tmp_path / "sharded"))
    use(corpus.good_gguf(tmp_path / "model.gguf"))
    for part in good_split(tmp_path):
        assert len(use(part).names()) == len(corpus.weights())


def test_no_two_cases_have_the_same_name():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_is_refused(case, tmp_path, monkeypatch):
    model = case.build(tmp_path)
    allocated: list[int] = []
    real = safetensors_file.allocate_bytes

    def record(path: Path, count: int) -> torch.Tensor:
        allocated.append(count)
        return real(path, count)

    monkeypatch.setattr(safetensors_file, "allocate_bytes", record)
    monkeypatch.setattr(gguf_file, "allocate_bytes", record)
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            use(model)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert case.names in message
    assert case.says in message
    assert message.isprintable() or "\n" in message
    assert peak < MOST_BYTES
    assert max(allocated, default=0) < MOST_BYTES

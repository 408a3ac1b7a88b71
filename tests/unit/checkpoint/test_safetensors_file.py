"""Reading and writing safetensors: the same values and bytes as the safetensors package."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from quern.checkpoint.safetensors_file import DTYPES, allocate_bytes, read_header, read_tensor, write_safetensors
from quern.core.errors import BadFileError, UserError
from quern.core.text.units import bytes_text


def one_of_each() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for dtype in DTYPES.values():
        for shape in ((), (0, 3), (1,), (3, 5), (2, 0, 2), (2, 3, 4)):
            values = torch.randint(0, 2, shape, generator=generator)
            tensors[f"{dtype} {shape}"] = values.to(dtype)
    tensors['näme " \n\\'] = torch.randn(7, generator=generator)
    return tensors


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(
        left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)
    )


def read_all(path) -> dict[str, torch.Tensor]:
    return {name: read_tensor(path, info) for name, info in read_header(path).items()}


def test_tensors_of_whole_lines_begin_on_a_line(tmp_path):
    tensors = {f"{name}{size}": torch.zeros(size, dtype=torch.uint8) for name in "abc" for size in (64, 3, 320, 65)}
    tensors["odd"] = torch.zeros(3)
    write_safetensors(tmp_path / "file", tensors, {"format": "pt"})
    header = read_header(tmp_path / "file")
    lines = {name for name, info in header.items() if info.begin % 64 == 0}
    assert lines >= {f"{name}{size}" for name in "abc" for size in (64, 320)}
    assert header["odd"].begin % 4 == 0


def test_bytes_are_golden(tmp_path):
    """Fixed for ever: the header's text, its padding, and the order (whole lines first, I32 before BF16 before U8, then
    by name)."""
    tensors = {
        "y": torch.full((64,), 5, dtype=torch.uint8),
        "b": torch.tensor([1, 2], dtype=torch.uint8),
        "z": torch.tensor([1.0], dtype=torch.bfloat16),
        "a": torch.tensor([[3]], dtype=torch.int32),
        "c": torch.tensor([4], dtype=torch.int32),
    }
    write_safetensors(tmp_path / "file", tensors, {"v": "1", "format": "pt"})
    raw = (tmp_path / "file").read_bytes()
    header = (
        b'{"__metadata__":{"format":"pt","v":"1"},"y":{"dtype":"U8","shape":[64],"data_offsets":[0,64]},'
        b'"a":{"dtype":"I32","shape":[1,1],"data_offsets":[64,68]},"c":{"dtype":"I32","shape":[1],"data_offsets":[68,72]},'
        b'"z":{"dtype":"BF16","shape":[1],"data_offsets":[72,74]},"b":{"dtype":"U8","shape":[2],"data_offsets":[74,76]}}'
    )
    header += b" " * (-(8 + len(header)) % 64)
    assert raw == len(header).to_bytes(8, "little") + header + b"\5" * 64 + b"\3\0\0\0\4\0\0\0\x80\x3f\1\2"


def test_order_of_the_arguments_changes_nothing(tmp_path):
    tensors = one_of_each()
    write_safetensors(tmp_path / "one", tensors, {"a": "1", "b": "2"})
    write_safetensors(tmp_path / "two", dict(reversed(tensors.items())), {"b": "2", "a": "1"})
    digests = {hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("one", "two")}
    assert len(digests) == 1


def test_the_package_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    tensors = one_of_each()
    write_safetensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    for read in (load_file(tmp_path / "ours"), read_all(tmp_path / "theirs")):
        assert set(read) == set(tensors)
        assert all(same(read[name], tensors[name]) for name in tensors)


def test_views_and_gradients_are_written_by_value(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"turned": base.T, "step": base[::2, 1:], "trained": torch.nn.Parameter(base.clone())}
    write_safetensors(tmp_path / "file", tensors)
    read = read_all(tmp_path / "file")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_read_tensor_is_aligned_fresh_memory(tmp_path):
    write_safetensors(tmp_path / "file", {"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(1000)})
    header = read_header(tmp_path / "file")
    for name in ("a", "b"):
        first, second = (read_tensor(tmp_path / "file", header[name]) for _ in range(2))
        assert first.data_ptr() % 64 == 0
        first += 1
        assert not second.any()


def test_info_tells_elements_and_bytes(tmp_path):
    write_safetensors(tmp_path / "file", {"a": torch.zeros(3, 5, dtype=torch.bfloat16)})
    info = read_header(tmp_path / "file")["a"]
    assert (info.dtype, info.shape, info.elements, info.stored_bytes) == ("BF16", (3, 5), 15, 30)


def test_a_file_that_shrank_after_its_header_was_read_is_refused(tmp_path):
    path = tmp_path / "file"
    write_safetensors(path, {"a": torch.zeros(100)})
    info = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadFileError, match="truncated: ends at byte"):
        read_tensor(path, info)


def test_a_truth_value_of_two_is_refused(tmp_path):
    path = tmp_path / "file"
    write_safetensors(path, {"a": torch.tensor([True, True])})
    path.write_bytes(path.read_bytes()[:-1] + b"\2")
    with pytest.raises(BadFileError, match="other than 0 and 1"):
        read_tensor(path, read_header(path)["a"])


def test_a_tensor_larger_than_memory_is_a_users_error():
    """More than any address space; a sparse file can keep every promise of its header and still not be held."""
    with pytest.raises(UserError, match=f"large: one tensor needs {bytes_text(1 << 60)} of memory"):
        allocate_bytes("large", 1 << 60)


def test_missing_file_and_folder_are_named(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(BadFileError, match=str(path)):
            read_header(path)

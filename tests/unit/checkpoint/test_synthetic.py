"""Checkpoints that are drawn from a seed."""

import hashlib
import json

import pytest
import torch

from quern.checkpoint.checkpoint import open_checkpoint
from quern.checkpoint.synthetic import DrawnTensor, open_synthetic
from quern.core.errors import BadFileError

FACTORS = {"rows": [[1, 2.0]], "columns": [[2, 0.5]], "set": [[3, 4, 7.0]]}


def write(folder, tensors, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "num_hidden_layers": 1}), "utf-8")
    content = {"version": 1, "seed": 5, "tensors": tensors, **changes}
    (folder / "synthetic.json").write_text(json.dumps(content), "utf-8")
    return folder


def digest(tensor):
    return hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def test_the_same_seed_and_name_give_the_same_bytes_everywhere(tmp_path):
    shape = {"shape": [64, 96], "scale": 0.01}
    source = open_synthetic(write(tmp_path / "a", {"x": shape, "y": shape}))
    again = open_synthetic(write(tmp_path / "b", {"y": shape}))
    other = open_synthetic(write(tmp_path / "c", {"y": shape}, seed=6))
    assert torch.equal(source.read("y"), again.read("y"))
    assert not torch.equal(source.read("y"), source.read("x"))
    assert not torch.equal(source.read("y"), other.read("y"))
    assert digest(source.read("x")) == "d4f9deef76a69da5", "bytes of other machines and versions"


def test_distributions_have_unit_variance_and_the_tails_that_they_promise():
    def drawn(distribution):
        from quern.checkpoint.synthetic import draw

        result = torch.empty(1 << 20)
        draw(DrawnTensor(shape=(1 << 20,), dtype="F32", distribution=distribution), 3, result)
        return result

    normal, heavy = drawn("normal"), drawn("student4")
    # The mean of 2**20 squares has a standard deviation of sqrt(kurtosis - 1) / 2**10, of Student's t with its ends cut .006.
    assert normal.var() == pytest.approx(1, abs=0.01)
    assert heavy.var() == pytest.approx(1, abs=0.03)
    assert ((normal**4).mean(), normal.abs().max() < 4.4) == (pytest.approx(3, abs=0.05), True)
    assert (heavy**4).mean() > 10
    assert heavy.abs().max() > 15
    # 97.5 % of Student's t with four degrees of freedom lie below 2.776, its deviation is the root of two.
    assert float((heavy < 2.776445 / 2**0.5).float().mean()) == pytest.approx(0.975, abs=0.001)


def test_constants_factors_and_set_numbers_are_in_their_places(tmp_path):
    plain = {"shape": [8, 6], "scale": 0.5, "mean": 1.0, "dtype": "F32"}
    tensors = {"x": plain, "ones": {"shape": [4], "distribution": "constant", "mean": 1.0, "rows": [[2, 8.0]]}}
    before = open_synthetic(write(tmp_path / "a", tensors)).read("x")
    source = open_synthetic(write(tmp_path / "b", {**tensors, "x": {**plain, **FACTORS}}))
    wanted = before.clone()
    wanted[1] *= 2
    wanted[:, 2] *= 0.5
    wanted[3, 4] = 7
    assert torch.equal(source.read("x"), wanted)
    assert torch.equal(source.read("ones"), torch.tensor([1, 1, 8, 1], dtype=torch.bfloat16))


def test_a_long_tensor_is_what_its_parts_would_be(tmp_path, monkeypatch):
    tensors = {"x": {"shape": [1000, 33], "scale": 1.0}}
    whole = open_synthetic(write(tmp_path / "a", tensors)).read("x")
    monkeypatch.setattr("quern.checkpoint.synthetic._AT_ONCE", 64)
    assert torch.equal(open_synthetic(tmp_path / "a").read("x"), whole)


def test_it_is_a_checkpoint_like_others(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "a", {"x": {"shape": [4, 6]}, "y": {"shape": [5]}}))
    assert checkpoint.names() == ["x", "y"]
    assert checkpoint.parameters == 29
    assert checkpoint.info("x").shape == (4, 6)
    assert checkpoint.bf16_bytes == 58 + sum(path.stat().st_size for path in checkpoint.files)
    assert {path.name for path in checkpoint.files} == {"config.json", "synthetic.json"}
    first = checkpoint.sha256()
    write(tmp_path / "a", {"x": {"shape": [4, 6]}, "y": {"shape": [5]}}, seed=9)
    assert open_checkpoint(tmp_path / "a").sha256() != first


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version 2; version 1 is read"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"unknown": 1}, "unknown"),
        ({"tensors": []}, "tensors"),
        ({"tensors": {"x": {"shape": []}}}, "shape"),
        ({"tensors": {"x": {"shape": [0, 3]}}}, "shape"),
        ({"tensors": {"x": {"shape": [2**40, 2**40]}}}, "2**48"),
        ({"tensors": {"x": {"shape": [4, 4], "scale": 1e999}}}, "Infinity"),
        ({"tensors": {"x": {"shape": [4, 4], "dtype": "I8"}}}, "dtype"),
        ({"tensors": {"x": {"shape": [4, 4], "rows": [[4, 1.0]]}}}, "rows"),
        ({"tensors": {"x": {"shape": [4, 5], "columns": [[5, 1.0]]}}}, "columns"),
        ({"tensors": {"x": {"shape": [4, 4], "set": [[0, 4, 1.0]]}}}, "places"),
        ({"tensors": {"x": {"shape": [4], "columns": [[0, 1.0]]}}}, "vector"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(tmp_path, changes, words):
    folder = write(tmp_path / "a", **{"tensors": {"x": {"shape": [4, 4]}}, **changes})
    with pytest.raises(BadFileError, match=words.replace("*", r"\*")):
        open_synthetic(folder)


def test_a_tensor_that_no_memory_holds_is_refused_when_it_is_read(tmp_path):
    source = open_synthetic(write(tmp_path / "a", {"x": {"shape": [2**24, 2**24]}}))
    with pytest.raises(Exception, match="memory"):
        source.read("x")

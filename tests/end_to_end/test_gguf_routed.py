"""GGUF files of families whose blocks send tokens to experts: written, read back where they lie, refused where they are wrong."""

from __future__ import annotations

import functools
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from artifacts import INT8, small_recipe
from safetensors.torch import load_file, save_file
from tiny_model import tiny_config, write_model

from quern.checkpoint.checkpoint import open_checkpoint
from quern.checkpoint.gguf.header import read_gguf_header
from quern.core.errors import QuernError, UserError
from quern.engines.base import ENGINES, engine_for
from quern.loading.fitting import open_model
from quern.pipeline.export import export
from quern.pipeline.quantize import quantize

IDS = torch.randint(0, 296, (2, 21), generator=torch.Generator().manual_seed(3))
INNER = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 96}
FAMILIES = {
    "mixtral": tiny_config("mixtral", num_hidden_layers=2, intermediate_size=64),
    "qwen2_moe": tiny_config("qwen2_moe", num_hidden_layers=2, tie_word_embeddings=False, **INNER),
    "qwen3_moe": tiny_config("qwen3_moe", num_hidden_layers=2, num_experts=6, num_experts_per_tok=3, **INNER),
}
MIXED = {
    "rounding": {"method": "nearest"},
    "weights": {"bits": 4, "group_size": 32},
    "overrides": [
        {"pattern": "*.0.mlp.experts.*.up_proj", "codec": "none"},
        {"pattern": "*.1.mlp.experts.*.down_proj", "bits": 8, "group_size": 32},
        {"pattern": "*.o_proj", "codec": "mxfp4"},
    ],
    "embedding": INT8,
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def logits(path: Path, engine: str = "reference") -> torch.Tensor:
    return ENGINES.get(engine)().load(path, dtype="float32").logits(IDS)


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {t.name: (t.tensor_type.name, tuple(int(n) for n in t.shape[::-1])) for t in gguf.GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("routed")

    @functools.cache
    def of(family: str) -> tuple[Path, Path, Path]:
        model, folder, file = (root / f"{family}{end}" for end in ("", "-folder", ".gguf"))
        write_model(model, FAMILIES[family])
        for path in (folder, file):
            recipe = small_recipe(**MIXED)
            quantize(model, path, recipe=recipe, format="gguf" if path == file else "quern", threads=1)
        return model, folder, file

    return of


@every_family
def test_a_file_computes_what_the_folder_computes(family, made):
    """The same codes, in ggml's blocks and stacks: not a bit of a logit differs."""
    _, folder, file = made(family)
    assert torch.equal(logits(file), logits(folder))


def test_the_cpu_engine_runs_stacks_where_they_lie(tmp_path):
    """Bit for bit what it computes with the same blocks one expert a tensor; and no weight is copied or dequantized."""
    model = write_model(tmp_path / "model", {**FAMILIES["qwen2_moe"], "torch_dtype": "float32"})
    scheme = {"codec": "ggml", "type": "q4_0"}
    wider = [{"pattern": "*.down_proj", "codec": "ggml", "type": "q8_0"}]
    recipe = small_recipe(
        weights=scheme, embedding=scheme, head=scheme, overrides=wider, rounding={"method": "nearest"}
    )
    quantize(model, tmp_path / "folder", recipe=recipe, threads=1)
    export(tmp_path / "folder", tmp_path / "model.gguf")
    assert engine_for(open_checkpoint(tmp_path / "model.gguf")) == "cpu"
    packed = ENGINES.get("cpu")().load(tmp_path / "model.gguf", threads=2)
    assert torch.equal(packed.logits(IDS), logits(tmp_path / "folder", "cpu"))
    assert packed.notes == []
    assert packed.bytes_per_token() == ENGINES.get("cpu")().load(tmp_path / "folder").bytes_per_token()


@every_family
def test_stacks_and_metadata_are_llama_cpps(family, made, tmp_path):
    _, folder, file = made(family)
    config, found = FAMILIES[family], tensors(file)
    count = config.get("num_experts") or config["num_local_experts"]
    assert found["blk.0.ffn_gate_exps.weight"] == ("Q4_0", (count, 64, 64))
    assert found["blk.0.ffn_up_exps.weight"] == ("BF16", (count, 64, 64))
    assert found["blk.1.ffn_up_exps.weight"][0] == "Q4_0"
    assert found["blk.1.ffn_down_exps.weight"] == ("Q8_0", (count, 64, 64))
    assert found["blk.1.ffn_gate_inp.weight"] == ("F32", (count, 64))
    assert ("blk.0.ffn_gate_inp_shexp.weight" in found) == (family == "qwen2_moe")
    if family == "qwen2_moe":
        assert found["blk.0.ffn_gate_inp_shexp.weight"] == ("F32", (64,))
        assert found["blk.0.ffn_down_shexp.weight"] == ("Q4_0", (64, 96))
    said = read_gguf_header(file).metadata
    arch = {"mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}[family]
    assert said["general.architecture"] == arch
    assert (said[f"{arch}.expert_count"], said[f"{arch}.expert_used_count"]) == (count, config["num_experts_per_tok"])
    assert said.get(f"{arch}.expert_feed_forward_length") == (None if family == "mixtral" else 64)
    assert said.get(f"{arch}.expert_shared_feed_forward_length") == (96 if family == "qwen2_moe" else None)
    report = export(folder, tmp_path / "exported.gguf")
    assert tensors(tmp_path / "exported.gguf") == found
    assert report.bytes == (tmp_path / "exported.gguf").stat().st_size


@every_family
def test_an_unquantized_model_reads_back_as_it_was(family, made, tmp_path):
    model, _, _ = made(family)
    export(model, tmp_path / "model.gguf")
    ours, theirs = open_model(tmp_path / "model.gguf"), open_model(model)
    assert set(ours.names()) == set(theirs.names())
    assert all(torch.equal(ours.read(name).float(), theirs.read(name).float()) for name in theirs.names())
    assert ours.parameters == theirs.parameters
    for engine in ("reference", "cpu"):
        assert torch.equal(logits(tmp_path / "model.gguf", engine), logits(model, engine))


def test_stored_values_are_taken_over_from_a_file(made, tmp_path):
    """A routed GGUF as the source: each expert's blocks are those of the stack."""
    _, _, file = made("qwen3_moe")
    recipe = small_recipe(
        weights={"bits": 4, "group_size": 32}, rounding={"method": "stored"}, overrides=MIXED["overrides"]
    )
    quantize(file, tmp_path / "out.gguf", recipe=recipe, format="gguf", threads=1)
    assert torch.equal(logits(tmp_path / "out.gguf"), logits(file))


def test_parts_of_a_size_hold_whole_stacks(made, tmp_path):
    _, folder, file = made("mixtral")
    report = export(folder, tmp_path / "parts.gguf", format_options={"shard-size": "60KB"})
    assert report.path.name.startswith("parts-00001-of-")
    assert torch.equal(logits(report.path, "cpu"), logits(file, "cpu"))


def test_experts_of_several_types_are_refused_before_any_work(made, tmp_path):
    model, _, _ = made("qwen3_moe")
    for override in ({"bits": 8, "group_size": 32}, {"codec": "none"}):
        recipe = small_recipe(
            weights={"bits": 4, "group_size": 32}, overrides=[{"pattern": "*.1.mlp.experts.2.up_proj", **override}]
        )
        with pytest.raises(
            UserError, match=r"blk\.1\.ffn_up_exps\.weight holds this matrix of all experts in one type"
        ):
            quantize(model, tmp_path / "x.gguf", recipe=recipe, format="gguf", threads=1)
    assert not list(tmp_path.iterdir())


def rewritten(source: Path, file: Path, change=lambda name, data: data, **metadata: object) -> Path:
    """``source`` with other tensors (None leaves one out) and values of metadata (None leaves one out)."""
    reader = gguf.GGUFReader(source)
    arch = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    writer = gguf.GGUFWriter(file, arch)
    for name, field in reader.fields.items():
        short = name.removeprefix(f"{arch}.")
        if name.startswith(("GGUF.", "general.architecture")) or len(field.types) > 1 or short in metadata:
            continue
        value = field.contents()
        writer.add_key_value(name, value, field.types[0])
    for name, value in metadata.items():
        if value is not None:
            kind = gguf.GGUFValueType.BOOL if isinstance(value, bool) else gguf.GGUFValueType.UINT32
            writer.add_key_value(f"{arch}.{name}", value, kind)
    for tensor in reader.tensors:
        if (data := change(tensor.name, np.array(tensor.data))) is not None:
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_the_copies_of_the_next_test_are_right_but_for_what_they_change(made, tmp_path):
    _, _, file = made("qwen2_moe")
    assert torch.equal(logits(rewritten(file, tmp_path / "same.gguf")), logits(file))


DOWN = "blk.0.ffn_down_exps.weight"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"expert_count": 5}, r"has shape \(4, 64, 64\); it must be a stack of 5 matrices"),
        ({"expert_count": 0}, "says that a qwen2moe model has no experts"),
        ({"expert_count": 2**31 - 1}, "must be an integer from 1 to 4096|must be a stack of"),
        ({"expert_used_count": None}, "expert_used_count"),
        ({"expert_used_count": 9}, "num_experts_per_tok must be an integer from 1 to the 4 experts"),
        ({"expert_feed_forward_length": 32}, "has shape"),
        ({"expert_shared_feed_forward_length": 32}, "has shape"),
        ({"expert_weights_norm": True}, "expert_weights_norm: True, which llama.cpp ignores"),
        ({"expert_gating_func": 2}, "expert_gating_func: 2"),
        ({"change": lambda name, data: None if name == DOWN else data}, r"experts\.0\.down_proj\.weight' is missing"),
        ({"change": lambda name, data: data[0] if name == DOWN else data}, "must be a stack of 4 matrices"),
        ({"change": lambda name, data: data[:3] if name == DOWN else data}, "must be a stack of 4 matrices"),
        ({"change": lambda name, data: data[:, :32] if name == DOWN else data}, "has shape"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(changes, why, made, tmp_path):
    _, _, file = made("qwen2_moe")
    broken = rewritten(file, tmp_path / "broken.gguf", **changes)
    with pytest.raises(QuernError, match=why):
        open_model(broken)


def test_a_dense_file_with_a_stack_is_refused(tmp_path):
    model = write_model(tmp_path / "model", tiny_config("qwen3", attention_bias=False, num_hidden_layers=1))
    export(model, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert "blk.0.ffn_up.weight" in {tensor.name for tensor in reader.tensors}
    content = (tmp_path / "model.gguf").read_bytes().replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_up_exps.weig"[:19])
    (tmp_path / "other.gguf").write_bytes(content)
    with pytest.raises(QuernError, match="does not have|do not have|stack"):
        open_model(tmp_path / "other.gguf")


def test_a_router_that_is_no_number_is_named(made, tmp_path):
    model, _, _ = made("mixtral")
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("mlp.gate.weight"))
    weights[name][0, 0] = float("nan")
    broken = write_model(tmp_path / "broken", FAMILIES["mixtral"])
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuernError, match=r"mlp\.gate\.weight"):
        export(broken, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()

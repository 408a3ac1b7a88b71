"""What a GGUF is written of: metadata that read back as they were, tensors in their places, tokenizers that keep their tokens."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_model import tiny_config, write_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from quern.architectures.base import architecture_of
from quern.checkpoint.gguf.config import config_of
from quern.checkpoint.gguf.header import GgufHeader, GgufTensor
from quern.checkpoint.gguf.names import (
    expert_of,
    gguf_name,
    interleave_rows,
    names_of_experts,
    restore_row_order,
    transformers_name,
)
from quern.checkpoint.gguf.pre_tokenizers import (
    CHECK_TEXT,
    RULES,
    check_hash,
    known_names,
    name_of_description,
    name_of_hash,
)
from quern.checkpoint.gguf.tokenizer import ARRAYS, load_gguf_tokenizer, tokenizer_of
from quern.checkpoint.gguf.writing.container import TensorPlan, write_gguf
from quern.checkpoint.gguf.writing.metadata import model_metadata
from quern.checkpoint.gguf.writing.vocabulary import vocabulary
from quern.checkpoint.tokenizer import load_tokenizer
from quern.core.errors import UserError

BUNDLED = Path(__file__).resolve().parents[3] / "models" / "python-7m"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192, "rope_theta": 500000.0}  # fmt: skip


def completed(config: dict[str, Any]) -> dict[str, Any]:
    return architecture_of(config).config.to_dict()


def read_back(config: dict[str, Any], name: str = "some model") -> dict[str, Any]:
    """The configuration that the reader makes of what the writer says."""
    said = model_metadata(completed(config), [0] * config["num_hidden_layers"], name)
    shapes = {gguf_name(n): GgufTensor(tuple(s), 0, 0, 0) for n, s in architecture_of(config).module_shapes().items()}
    factors = None if said.factors is None else said.factors.double().numpy()
    metadata = {key: tuple(value) if isinstance(value, list) else value for key, value in said.values.items()}
    return config_of(Path("x.gguf"), GgufHeader(metadata, shapes), factors)


FAMILIES = {
    "llama": tiny_config("llama", tie_word_embeddings=False),
    "llama without biases": tiny_config("llama", attention_bias=False),
    "llama 3": tiny_config("llama", attention_bias=False, head_dim=64, max_position_embeddings=32768, rope_parameters=LLAMA3),
    "linear": tiny_config("qwen2", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    "yarn": tiny_config("qwen2", rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6,
                        "original_max_position_embeddings": 32, "attention_factor": 1.25, "beta_fast": 16.0}),
    "mistral": tiny_config("mistral"),
    "qwen2": tiny_config("qwen2"),
    "qwen3": tiny_config("qwen3", attention_bias=False, head_dim=32),
    "mixtral": tiny_config("mixtral", head_dim=32),
    "qwen2_moe": tiny_config("qwen2_moe", tie_word_embeddings=False),
    "qwen2_moe without biases": tiny_config("qwen2_moe", tie_word_embeddings=False, qkv_bias=False),
    "qwen3_moe": tiny_config("qwen3_moe", num_experts=6, moe_intermediate_size=48),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_configuration_reads_back_as_what_it_computes(name):
    config = FAMILIES[name]
    again, once = completed(read_back(config)), completed(config)
    rope, other = again.pop("rope_parameters"), once.pop("rope_parameters")
    assert rope["rope_type"] == other["rope_type"]
    for key in set(other) - {"rope_type"}:
        assert rope[key] == pytest.approx(other[key], rel=1e-6), key
    assert again["rms_norm_eps"] == pytest.approx(once["rms_norm_eps"], rel=1e-6)
    compared = set(once) - {
        "bos_token_id",
        "eos_token_id",
        "dtype",
        "initializer_range",
        "architectures",
        "rms_norm_eps",
    }
    compared -= {"torch_dtype"}  # what it was stored in
    assert {key: again.get(key) for key in compared} == {key: once[key] for key in compared}


def test_windows_are_said_and_noted():
    config = tiny_config("mistral", sliding_window=16)
    said = model_metadata(completed(config), [16] * 3, "x")
    assert said.values["llama.attention.sliding_window"] == 16
    assert "sees 16 positions back" in said.notes[0]
    some = tiny_config("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    said = model_metadata(completed(some), [0, 8, 8], "x")
    assert said.values["qwen2.attention.sliding_window_pattern"] == [False, True, True]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (tiny_config("qwen2", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "'dynamic'"),
        (tiny_config("qwen2", rope_parameters={**LLAMA3}), "reads no factors"),
        (tiny_config("qwen2", head_dim=32), None),
        (tiny_config("qwen3", attention_bias=True), "attention_bias"),
        (tiny_config("llama", hidden_act="gelu"), "activation gelu"),
        (tiny_config("qwen3_moe", norm_topk_prob=False), "norm_topk_prob False, llama.cpp divides"),
        (tiny_config("qwen2_moe", norm_topk_prob=True, tie_word_embeddings=False), "llama.cpp does not divide"),
        (tiny_config("qwen2_moe"), "llama.cpp wants a head of its own"),
        (tiny_config("qwen3_moe", mlp_only_layers=[1]), "blocks without experts"),
        (tiny_config("qwen3_moe", decoder_sparse_step=2), "blocks without experts"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(config, why):
    if why is None:  # transformers' qwen2 has no such key
        config, why = {**completed(config), "head_dim": 32}, "heads of 32 channels"
    else:
        config = completed(config)
    with pytest.raises(UserError, match=why):
        model_metadata(config, [0, 0, 0], "x")


def test_other_families_are_refused_with_the_known_ones():
    with pytest.raises(
        UserError, match="'bloom' model is not written as GGUF; families that are: llama, mistral, qwen2, qwen3"
    ):
        model_metadata({"model_type": "bloom"}, [], "x")


def test_names_go_both_ways_and_rows_too():
    for config in FAMILIES.values():
        for name in architecture_of(config).module_shapes():
            stored, expert = gguf_name(name), expert_of(name)
            if (around := names_of_experts(stored)) is not None:
                assert f"{expert}".join(around) == name
            else:
                assert transformers_name(Path("x"), stored) == name
                assert expert is None
    assert gguf_name("model.layers.3.mlp.experts.7.down_proj.weight") == "blk.3.ffn_down_exps.weight"
    with pytest.raises(UserError, match="no name for the tensor 'model.layers.0.mlp.router.weight'"):
        gguf_name("model.layers.0.mlp.router.weight")
    rows = torch.arange(24)[:, None] * torch.ones(1, 3)
    assert interleave_rows(rows, 3)[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(restore_row_order(interleave_rows(rows, 3), 3), rows)


# the file


METADATA = {"general.architecture": "llama", "a.whole": 7, "a.number": 0.5, "a.text": "ü", "a.truth": True,
            "a.list": ["x", ""], "a.numbers": [1, -2], "a.scores": [-0.5], "a.nothing": []}  # fmt: skip
TENSORS = [TensorPlan("f32", (3,), "F32"), TensorPlan("bf16", (2, 5), "BF16"), TensorPlan("blocks", (2, 64), "Q4_0")]
DATA = [
    torch.tensor([1.0, 2.0, 3.0]),
    torch.arange(10).view(2, 5).bfloat16(),
    torch.arange(72, dtype=torch.uint8).view(2, 36),
]


def test_the_reader_of_the_package_gguf_reads_the_file(tmp_path):
    write_gguf(tmp_path / "x.gguf", METADATA, TENSORS, iter(DATA))
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    for key, value in METADATA.items():
        if key != "a.nothing":
            assert reader.fields[key].contents() == value, key
    assert "a.nothing" not in reader.fields
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert [str(found[t.name].tensor_type.name) for t in TENSORS] == [t.kind for t in TENSORS]
    assert [tuple(reversed(found[t.name].shape.tolist())) for t in TENSORS] == [t.shape for t in TENSORS]
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)
    assert np.array_equal(found["f32"].data, DATA[0].numpy())
    assert found["bf16"].data.tobytes() == DATA[1].view(torch.uint8).numpy().tobytes()
    assert found["blocks"].data.tobytes() == DATA[2].numpy().tobytes()


def test_a_file_that_does_not_fit_says_so(tmp_path):
    many = [TensorPlan("f32", (1 << 16,), "F32")]
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, old[1]))
    try:
        with pytest.raises(UserError, match="no file may be so large there"):
            write_gguf(tmp_path / "x.gguf", METADATA, many, [torch.zeros(1 << 16)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_numbers_that_the_format_has_not_are_refused(tmp_path):
    with pytest.raises(UserError, match="no number of 32 bits"):
        write_gguf(tmp_path / "x.gguf", {"general.architecture": "llama", "a": 1 << 32}, [], [])
    with pytest.raises(UserError, match="no whole Q4_0 blocks"):
        write_gguf(tmp_path / "x.gguf", METADATA, [TensorPlan("x", (2, 33), "Q4_0")], [])


# tokenizers


def test_the_hash_is_the_one_that_the_converter_computes():
    """The bundled tokenizer's, by llama.cpp's own converter."""
    ids = load_tokenizer(BUNDLED).encode(CHECK_TEXT)
    assert check_hash(ids) == "53c408419716884be4ec133132604e8c2ee9052cf618331eeee3315a6dc67ff8"
    assert name_of_hash(check_hash(ids)) is None
    assert name_of_hash("855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249") == "smollm"
    assert {"qwen2", "llama-bpe", "gpt-4o", "glm4", "default"} <= set(known_names())


def test_a_vocabulary_that_nobody_knows_is_named_by_its_description():
    described = json.loads((BUNDLED / "tokenizer.json").read_text("utf-8"))
    assert name_of_description(described) == "qwen2"
    made = vocabulary(BUNDLED, 4100, [0])
    assert (made.values["tokenizer.ggml.pre"], len(made.notes)) == ("qwen2", 1)
    assert "53c408419716884b" in made.notes[0]
    assert made.values["tokenizer.ggml.tokens"][4095:] == ["gener", "[PAD4096]", "[PAD4097]", "[PAD4098]", "[PAD4099]"]
    assert made.values["tokenizer.ggml.token_type"][-2:] == [5, 5]


@pytest.mark.parametrize("names", RULES, ids=lambda names: names[0])
def test_every_rule_is_found_by_what_tokenizer_json_says(names):
    rule = RULES[names]
    cuts = [pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in rule.cuts]
    tokenizer = Tokenizer(models.BPE(ignore_merges=rule.whole_words))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last])
    if rule.composed:
        tokenizer.normalizer = normalizers.NFC()
    assert name_of_description(json.loads(tokenizer.to_str())) == names[0]


def byte_level(folder: Path, cut: str) -> Path:
    """A folder with a byte-level tokenizer that cuts text by ``cut``."""
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(cut), behavior="isolated"), last])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a few words and some more words"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template="{{ messages }}")
    fast.save_pretrained(folder)
    return folder


def test_an_unknown_rule_is_refused_with_its_hash_or_forced_with_a_note(tmp_path):
    folder = byte_level(tmp_path, r"[aeiou]+|[^aeiou]+")
    digest = check_hash(load_tokenizer(folder).encode(CHECK_TEXT))
    with pytest.raises(UserError) as caught:
        vocabulary(folder, 320, [])
    assert digest in str(caught.value)
    assert all(name in str(caught.value) for name in ("qwen2", "llama-bpe", "option pre-tokenizer"))
    made = vocabulary(folder, 320, [], "gpt-2")
    assert made.values["tokenizer.ggml.pre"] == "gpt-2"
    assert "set to 'gpt-2' as asked for; it is unknown" in made.notes[0]
    assert "makes other tokens of a test text" in made.notes[1]
    with pytest.raises(UserError, match="pre-tokenizer 'zap' is none that llama.cpp has"):
        vocabulary(folder, 320, [], "zap")


def test_special_tokens_and_templates(tmp_path):
    made = vocabulary(byte_level(tmp_path, r"\p{N}"), 320, [257, 999], "gpt-2").values
    eos = load_tokenizer(tmp_path).eos_token_id
    assert (made["tokenizer.ggml.eos_token_id"], made["tokenizer.ggml.eot_token_id"]) == (eos, 257)
    assert made["tokenizer.chat_template"] == "{{ messages }}"
    assert (made["tokenizer.ggml.add_bos_token"], made["tokenizer.ggml.add_eos_token"]) == (False, False)
    assert made["tokenizer.ggml.token_type"][eos] == 3


def test_more_tokens_than_the_embedding_has_rows(tmp_path):
    with pytest.raises(UserError, match="its embedding 100 rows"):
        vocabulary(byte_level(tmp_path, r"\p{N}"), 100, [], "gpt-2")


def test_a_model_without_a_tokenizer(tmp_path):
    made = vocabulary(write_model(tmp_path / "model", tokenizer=False), 300, [])
    assert made.values == {"tokenizer.ggml.model": "none"}
    assert "no tokenizer" in made.notes[0]


def sentence_piece(folder: Path, **model: Any) -> Path:
    """A tokenizer as those of Llama 2 are, whose merges follow from scores."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁helowrd",
        "he",
        "ll",
        "hell",
        "▁hell",
    ]
    vocab = {word: index for index, word in enumerate(words)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("▁", "hell")]
    made = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True, **model)
    tokenizer = Tokenizer(made)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])  # fmt: skip
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)  # fmt: skip
    return folder


def test_merges_of_sentencepiece_become_scores(tmp_path):
    folder = sentence_piece(tmp_path)
    made = vocabulary(folder, 280, [])
    assert made.notes == []
    assert made.values["tokenizer.ggml.model"] == "llama"
    assert made.values["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert made.values["tokenizer.ggml.add_space_prefix"] is True
    scores = dict(zip(made.values["tokenizer.ggml.tokens"], made.values["tokenizer.ggml.scores"], strict=True))
    assert scores["he"] > scores["ll"] > scores["hell"] > scores["▁hell"]
    metadata = {k: tuple(v) if isinstance(v, list) else v for k, v in made.values.items()}
    ours, theirs = tokenizer_of(folder, metadata), load_tokenizer(folder)
    for text in ("hello", " hello world", "héllo 🎉", "hellhell", ""):
        assert ours.encode(text) == theirs.encode(text)


def test_merges_that_no_scores_give_are_refused(tmp_path):
    folder = sentence_piece(tmp_path)
    described = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    described["model"]["merges"] = described["model"]["merges"][:2]
    (folder / "tokenizer.json").write_text(json.dumps(described), "utf-8")
    with pytest.raises(UserError, match="no scores of pieces"):
        vocabulary(folder, 280, [])


def test_other_kinds_of_tokenizers_are_refused(tmp_path):
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="kind 'Unigram'"):
        vocabulary(tmp_path, 10, [])


def test_the_tokenizer_of_another_gguf_is_taken_over_word_for_word(tmp_path):
    once = vocabulary(BUNDLED, 4096, [0]).values
    write_gguf(tmp_path / "x.gguf", {"general.architecture": "qwen2", **once}, [], [])
    assert vocabulary(tmp_path / "x.gguf", 4096, []).values == once
    text = "def f(x):\n    return x + 12345"
    assert load_gguf_tokenizer(tmp_path / "x.gguf").encode(text) == load_tokenizer(BUNDLED).encode(text)
    assert set(ARRAYS) - set(once) == {"tokenizer.ggml.scores"}
    shutil.rmtree(tmp_path)

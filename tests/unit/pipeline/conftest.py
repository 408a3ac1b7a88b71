"""A model so small that every test may have one: two Qwen2 blocks, one token for each byte."""

from pathlib import Path

import pytest

END = 256
CONTEXT = 64


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory) -> Path:
    """A folder with config, float32 weights and tokenizer; token 256 ends a text."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("byte_model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=END + 1,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        eos_token_id=END,
        bos_token_id=None,
        initializer_range=0.5,
    )
    torch.manual_seed(11)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder

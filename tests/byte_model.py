"""A model so small that every test may have one: two Qwen2 blocks, one token for each byte."""

from __future__ import annotations

from pathlib import Path

END = 256
"""The token that ends a text."""


def write_byte_model(folder: Path, context: int = 64) -> Path:
    """Write config, seeded float32 weights and tokenizer into ``folder``; its path."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # transformers gives Qwen2 tokenizers a token of this name if they have none, and then one row too few.
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=END + 1,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        eos_token_id=END,
        bos_token_id=None,
        initializer_range=0.5,
    )
    torch.manual_seed(11)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder

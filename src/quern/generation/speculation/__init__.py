"""Speculative decoding: guesses of what follows, which one pass over the model's weights reads beside what is known."""

"""Measuring a server from outside, over HTTP: ours, or any other that speaks OpenAI's completions."""

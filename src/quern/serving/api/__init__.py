"""The protocols: OpenAI's, Anthropic's, and what runs beside them."""

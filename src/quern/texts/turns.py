"""How a chat template ends turns."""

from __future__ import annotations

from typing import Any

ANSWER = "quern"
"""Stands for what a model says, in the conversation that shows it."""


def turn_end(tokenizer: Any) -> int | None:
    """The token that the chat template writes behind an answer; None where there is no template or no such token.

    Where nothing stands behind the last answer, it is what separates an answer from the next turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    for messages in ([question, answer], [question, answer, question]):
        try:
            written = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # a template is a program of its author's, and fails as it likes
            continue
        _, mark, behind = written.rpartition(ANSWER)
        starts = [token for token in added if token and mark and behind.lstrip().startswith(token)]
        if starts:
            return int(added[max(starts, key=len)])
    return None

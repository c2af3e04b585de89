"""Conversations as training data: which tokens the tokenizer's chat template makes of them, and which of these the assistant says."""

from __future__ import annotations

import re
from typing import Any

from .errors import LcxError

Messages = list[dict[str, str]]


def is_conversation(messages: Any) -> bool:
    """Is it a list of messages, each with a role and a content of text?"""
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(m, dict) and all(isinstance(m.get(name), str) for name in ("role", "content"))
            for m in messages
        )
    )


def encode_chat(tokenizer, messages: Messages) -> tuple[list[int], list[int]]:
    """(token ids of the conversation, for each of them 1 if it is the assistant's and 0 otherwise).

    A template with {% generation %} marks what the assistant says. With another one, what rendering adds when an answer is
    added to the messages before it and their generation prompt is the assistant's: the end of its turn too, the header
    of the turn not.

    Raises LcxError if the tokenizer has no chat template or gives no offsets, and if the template refuses the
    conversation or writes earlier turns anew as it goes on.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise LcxError(
            "this tokenizer has no chat template, so conversations have no form: use a chat model, or data with a field text"
        )
    if not tokenizer.is_fast:  # there is no way from characters to tokens
        raise LcxError(
            "this tokenizer does not say where its tokens are in a text: use one with a tokenizer.json"
        )
    try:
        if re.search(r"{%-?\s*generation\s*-?%}", tokenizer.get_chat_template()):
            made = tokenizer.apply_chat_template(
                messages,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
            )
            return list(made["input_ids"]), list(made["assistant_masks"])
        return _by_prefixes(tokenizer, messages)
    except (TemplateError, ValueError, IndexError) as e:
        about = " ".join(str(e).split())
        raise LcxError(
            f"the chat template refuses a conversation that begins {_begin(messages)}: {about}"
        ) from e


def _begin(messages: Messages) -> str:
    return repr(f"{messages[0]['role']}: {messages[0]['content'][:40]}")


def _by_prefixes(tokenizer, messages: Messages) -> tuple[list[int], list[int]]:
    def render(count: int, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

    whole = render(len(messages))
    said = []  # from character, to character
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(i, prompt=True), render(i + 1)
            if not (whole.startswith(after) and after.startswith(before)):
                raise LcxError(
                    f"the chat template writes earlier turns anew in a conversation that begins {_begin(messages)}: "
                    "use a template with {% generation %}, or conversations with one answer, the last message"
                )
            said.append((len(before), len(after)))
    made = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    wanted = [
        int(end > start and any(a <= start < b for a, b in said)) for start, end in made["offset_mapping"]
    ]
    return list(made["input_ids"]), wanted

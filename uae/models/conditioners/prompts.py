"""The text around a caption: from a chat template to token ids that end as the template does, however long the caption."""

from __future__ import annotations

import warnings
from typing import Any

PLACEHOLDER = "{caption}"


def chat_template(words: Any, role: str = "user", system: bool | str = True, text: str = PLACEHOLDER) -> str:
    """One chat message and the generation prompt, as a template for captions. Nothing in it is escaped.

    Args:
        words: A tokenizer or a processor with a chat template, which may take a message's content as a string or as a
            list of parts.
        role: Of the message; templates in ChatML print any name (UAE: ``generate``).
        system: True: as the chat template has it, with a default system turn if it puts one. False: without that turn
            (UniWorld-V1). A string: this system message (MetaQuery).
        text: Content of the message; "{caption}" stands for the caption.

    Raises:
        ValueError: No chat template, one that does not show the text, or one whose system turn is not a part of its own.
    """
    if not getattr(words, "chat_template", None):
        raise ValueError(
            f"{type(words).__name__} has no chat template: point the system at an instruction-tuned checkpoint"
        )
    message = (role, text)
    if system is True:
        return _rendered(words, [message])
    first = ("system", system or "-")
    both = _rendered(words, [first, message])
    if system:
        return both
    alone = _rendered(words, [first], prompt=False)
    if not both.startswith(alone):
        raise ValueError("this chat template puts no system turn before the message, so system=False cannot cut it off")
    return both.removeprefix(alone)


def _rendered(words: Any, messages: list[tuple[str, str]], prompt: bool = True) -> str:
    """The messages in the chat template, content as plain strings if it takes those, else as lists of parts."""
    from jinja2 import TemplateError

    for as_parts in (False, True):
        turns = [
            {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text} for role, text in messages
        ]
        try:
            rendered = words.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        except (TemplateError, TypeError):
            continue
        if all(text in rendered for _, text in messages):
            return rendered
    raise ValueError(f"the chat template does not show {messages[-1][1]!r} in a message of role {messages[-1][0]!r}")


def check_template(template: str) -> None:
    """Raise unless a caption has exactly one place in the template."""
    if template.count(PLACEHOLDER) != 1:
        raise ValueError(f"conditioner template {template!r} has no {PLACEHOLDER}, or more than one; it must have one")


def prompt_ids(tokenizer: Any, template: str, texts: list[str], max_tokens: int) -> tuple[list[list[int]], int]:
    """Token ids of every caption in the template, and how many captions had to be cut.

    A caption that is too long loses its own last tokens, so that the prompt still ends as the template does.

    Args:
        tokenizer: Called without special tokens: those it needs are in the template.
        template: Text with one "{caption}". Braces in captions mean nothing.
        texts: N captions.
        max_tokens: Most tokens of a prompt, template included.
    """
    head, _, tail = template.partition(PLACEHOLDER)
    rows = _tokenized(tokenizer, [head + text + tail for text in texts])
    long = [n for n, row in enumerate(rows) if len(row) > max_tokens]
    if not long:
        return rows, 0
    least = len(_tokenized(tokenizer, [head + tail])[0])
    if least >= max_tokens:
        raise ValueError(
            f"max_tokens={max_tokens}, but the template alone takes {least} tokens: raise "
            "model.init_args.system.init_args.condition_tokens"
        )
    for n, opened in zip(long, _tokenized(tokenizer, [head + texts[n] for n in long]), strict=True):
        closing = max(len(rows[n]) - len(opened), 0)  # tokens of the tail, as they are behind this caption
        rows[n] = opened[: max_tokens - closing] + rows[n][len(rows[n]) - closing :]
    warn_truncated(len(long), len(texts), max_tokens)
    return rows, len(long)


def warn_truncated(cut: int, total: int, max_tokens: int) -> None:
    """Say that captions were cut."""
    warnings.warn(
        f"{cut} of {total} captions are longer than the conditioner reads and were cut to max_tokens={max_tokens}: "
        "raise model.init_args.system.init_args.condition_tokens, or lower model.init_args.sampling.max_tokens",
        stacklevel=3,
    )


def _tokenized(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    return [list(row) for row in tokenizer(prompts, add_special_tokens=False)["input_ids"]]

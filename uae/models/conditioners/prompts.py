"""Prompts around captions: from a chat template to token ids. A long caption is cut, the text around it is not."""

from __future__ import annotations

import warnings
from typing import Any

PLACEHOLDER = "{caption}"


def chat_template(tokenizer: Any, role: str = "user", system: bool | str = True, text: str = PLACEHOLDER, prompt: bool = True) -> str:
    """A prompt template of one chat message and, if asked for, the generation prompt. Nothing in it is escaped.

    Args:
        tokenizer: Tokenizer or processor with a chat template. The template may take the content of a message as a string
            or as a list of parts.
        role: Role of the message. Templates in ChatML accept any name (UAE: ``generate``).
        system: True keeps the default system message of the chat template, if it has one. False removes it (UniWorld-V1).
            A string replaces it (MetaQuery).
        text: Content of the message; "{caption}" marks the place of the caption.
        prompt: Whether the generation prompt follows, the first words of an answer.

    Raises:
        ValueError: There is no chat template, it does not show the text, or its system message cannot be removed.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{type(tokenizer).__name__} has no chat template: point the system at an instruction-tuned checkpoint")
    message = (role, text)
    if system is True:
        return _rendered(tokenizer, [message], prompt)
    first = ("system", system or "-")
    both = _rendered(tokenizer, [first, message], prompt)
    if system:
        return both
    alone = _rendered(tokenizer, [first], prompt=False)
    if not both.startswith(alone):
        raise ValueError("this chat template puts no system turn before the message, so system=False cannot cut it off")
    return both.removeprefix(alone)


def _rendered(tokenizer: Any, messages: list[tuple[str, str]], prompt: bool = True) -> str:
    """The messages in the chat template. Content is a plain string if the template takes one, else a list of parts."""
    from jinja2 import TemplateError

    for as_parts in (False, True):
        turns = [{"role": role, "content": [{"type": "text", "text": text}] if as_parts else text} for role, text in messages]
        try:
            rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        except (TemplateError, TypeError):
            continue
        if all(text in rendered for _, text in messages):
            return rendered
    raise ValueError(f"the chat template does not show {messages[-1][1]!r} in a message of role {messages[-1][0]!r}")


def check_template(template: str) -> None:
    """Check that a template contains "{caption}" exactly once.

    Raises:
        ValueError: It does not.
    """
    if template.count(PLACEHOLDER) != 1:
        raise ValueError(f"conditioner template {template!r} has no {PLACEHOLDER}, or more than one; it must have one")


def prompt_ids(tokenizer: Any, template: str, texts: list[str], max_tokens: int) -> tuple[list[list[int]], int]:
    """Token ids of N prompts, and the number of captions that were cut.

    If a caption is too long, its last tokens are removed, so that the prompt still ends with the end of the template.

    Args:
        tokenizer: Tokenizer that is called without special tokens, because the template contains them.
        template: Text with one "{caption}". Braces inside captions have no meaning.
        texts: N captions.
        max_tokens: Most tokens of a prompt, template included.

    Returns:
        N lists of token ids, and the number of captions that were cut.

    Raises:
        ValueError: The template alone has ``max_tokens`` tokens or more, and a caption is too long.
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
        closing = max(len(rows[n]) - len(opened), 0)  # number of tokens of the tail after this caption
        rows[n] = opened[: max_tokens - closing] + rows[n][len(rows[n]) - closing :]
    warn_truncated(len(long), len(texts), max_tokens)
    return rows, len(long)


def warn_truncated(cut: int, total: int, max_tokens: int) -> None:
    """Warn that ``cut`` of ``total`` captions were cut to ``max_tokens`` tokens."""
    warnings.warn(
        f"{cut} of {total} captions are longer than the conditioner reads and were cut to max_tokens={max_tokens}: "
        "raise model.init_args.system.init_args.condition_tokens, or lower model.init_args.sampling.max_tokens",
        stacklevel=3,
    )


def _tokenized(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    return [list(row) for row in tokenizer(prompts, add_special_tokens=False)["input_ids"]]

"""The tokens of a vision-language model that stand for images or surround them, and are never part of a caption."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

SIGHT = r"image|img|vision|visual|video|audio"
IDS = re.compile(rf"(^|_)({SIGHT}|[be]o[iav]|im|slice|frame)s?_.*(token|indicator).*_(id|ids|index)$")
NAMES = re.compile(rf"(^|_)({SIGHT}|[be]o[iav]|im|slice|frame)s?_(.*_)?token$")
WORDS = re.compile(rf"(^|[^a-z])({SIGHT})([^a-z]|$)", re.IGNORECASE)


def sight_ids(config: Any, processor: Any) -> set[int]:
    """Ids of the tokens that stand for images, videos or sound, or surround them: a caption with one could not be fed back.

    They are named by the configuration (``image_token_id``, ``visual_indicator_token_ids``), by the processor
    (``image_start_token``, ``image_token_ids``), or are special tokens that are spelled so (``<|begin_of_image|>``).
    """
    tokenizer = processor.tokenizer
    found = {number for name, value in vars(config).items() if IDS.search(name) for number in _numbers(value)}
    for name in ("image_token_ids", "video_token_ids"):
        found |= {*_numbers(getattr(processor, name, None))}
    spelled = {value for name, value in vars(processor).items() if NAMES.search(name) and isinstance(value, str)}
    for number, token in tokenizer.added_tokens_decoder.items():
        if token.content in spelled or (token.special and WORDS.search(token.content)):
            found.add(number)
    return found


def _numbers(value: Any) -> Iterator[int]:
    for one in value if isinstance(value, list | tuple) else [value]:
        if isinstance(one, int) and not isinstance(one, bool) and one >= 0:
            yield one

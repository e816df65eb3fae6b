"""Text as other programs write it: with or without a byte-order mark, and lines that end at line feeds only."""

from __future__ import annotations

import codecs
from pathlib import Path


def read_lines(file: str | Path) -> list[str]:
    """The lines of a text file, such as one of JSON Lines, without their line feeds.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8, or UTF-16 with a byte-order mark.
    """
    return lines_of(text_of(Path(file).read_bytes()))


def lines_of(text: str) -> list[str]:
    """The lines of a text. `str.splitlines` would also split inside JSON strings, which may hold U+2028, U+0085 and others."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def text_of(content: bytes) -> str:
    """The text in the bytes of a file, without its byte-order mark.

    Raises:
        ValueError: The bytes are not UTF-8, or UTF-16 with a byte-order mark.
    """
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if wide else "utf-8-sig")

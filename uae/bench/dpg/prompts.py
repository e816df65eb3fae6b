"""Prompts of DPG-Bench: a folder of text files, each named after its item."""

from __future__ import annotations

from pathlib import Path

from uae.bench.dpg.rules import FETCH


def read_prompts(folder: str | Path) -> dict[str, str]:
    """Item to its prompt, ordered by item. Files that do not end in .txt (in any case), and hidden ones, are left out.

    Raises:
        FileNotFoundError: There is no such folder, or there is no prompt in it.
        ValueError: A file is empty or no text, or two files are of one item.
    """
    root = Path(folder).expanduser()
    files = [file for file in sorted(root.glob("*")) if file.suffix.lower() == ".txt" and file.name[0] != "."]
    if not files:
        raise FileNotFoundError(f"--prompts {str(folder)!r} is no folder of .txt files; get them by: {FETCH}")
    prompts: dict[str, str] = {}
    for file in files:
        if file.stem in prompts:
            raise ValueError(f"--prompts: {file} and another file are both of item {file.stem!r}; rename or delete one")
        try:
            prompts[file.stem] = file.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError:
            raise ValueError(f"--prompts: {file} is no text in UTF-8; convert it") from None
        if not prompts[file.stem]:
            raise ValueError(f"--prompts: {file} is empty; write a prompt into it or delete it")
    return prompts

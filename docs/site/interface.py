"""A page for each public module, which mkdocstrings fills from its docstrings."""

from __future__ import annotations

from typing import Any

from mkdocs.structure.files import File, Files

MODULES = ("types", "rollout", "grpo", "rewards", "metrics", "encoders", "data", "module", "check")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for module in MODULES:
        files.append(File.generated(config, f"api/{module}.md", content=f"# uae.{module}\n\n::: uae.{module}\n"))
    return files

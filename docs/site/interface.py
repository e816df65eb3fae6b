"""A page for each public module, which mkdocstrings fills from its docstrings."""

from __future__ import annotations

from typing import Any

MODULES = ("types", "rollout", "grpo", "rewards", "metrics", "encoders", "data", "module", "check")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    from mkdocs.structure.files import File

    for module in MODULES:
        files.append(File.generated(config, f"api/{module}.md", content=f"# uae.{module}\n\n::: uae.{module}\n"))
    return files

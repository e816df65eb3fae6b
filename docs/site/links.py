"""Files outside of docs/ that the pages link to become a part of the site, so that one link serves GitHub and the site.

A page of Markdown or a notebook becomes a page, and any other file is copied. Links are written as GitHub reads them, relative to
the file that holds them, and are translated here.
"""

from __future__ import annotations

import os.path
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)")
SOURCES: dict[str, Path] = {}  # the file of each page that is in the repository, by the page's place on the site


def on_files(files: Any, config: Any) -> Any:
    """Add README.md as the overview, and all files that pages link to."""
    from mkdocs.structure.files import File

    SOURCES.clear()
    waiting = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for source in waiting:  # grows while it is read
        place = place_of(source)
        if place in SOURCES:
            continue
        SOURCES[place] = source
        if source.suffix == ".ipynb":
            add_notebook(source, files, config)
        elif files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(source)))
        if source.suffix == ".md":
            waiting += linked_files(source)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Translate the links of a page that is a file of the repository."""
    source = SOURCES.get(page.file.src_uri)
    if source is None:
        return markdown

    def translated(link: re.Match[str]) -> str:
        linked = (source.parent / link[2]).resolve()
        if not linked.is_file():
            return link[0]
        return link[1] + os.path.relpath(place_of(linked), Path(page.file.src_uri).parent)

    return LINK.sub(translated, markdown)


def linked_files(source: Path) -> list[Path]:
    """The files that a page links to."""
    linked = [(source.parent / name).resolve() for _, name in LINK.findall(source.read_text())]
    return [file for file in linked if file.is_file()]


def place_of(file: Path) -> str:
    """Where a file of the repository is among the sources of the site."""
    name = file.relative_to(ROOT)
    if str(name) == "README.md":
        return "overview.md"
    if name.suffix == ".ipynb":
        return str(name.with_suffix(".md"))
    return str(name.relative_to("docs") if name.parts[0] == "docs" else name)


def add_notebook(source: Path, files: Any, config: Any) -> None:
    """Add a notebook as a page, and its pictures beside it."""
    from mkdocs.structure.files import File
    from nbconvert import MarkdownExporter

    place = Path(place_of(source))
    text, resources = MarkdownExporter().from_filename(str(source), {"output_files_dir": f"{place.stem}_files"})
    files.append(File.generated(config, str(place), content=text))
    for name, content in resources["outputs"].items():
        files.append(File.generated(config, str(place.parent / name), content=content))

"""The site of `make docs`: what can be checked without mkdocs. CI builds it, and lets no warning pass."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "mkdocs.yml").read_text()
SITE = yaml.safe_load(TEXT)


def hook(name):
    spec = importlib.util.spec_from_file_location(f"docs_site_{name}", ROOT / f"docs/site/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def keys():
    return hook("keys")


@pytest.fixture(scope="module")
def pages(keys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["uae"])
        return keys.pages()


def row(page: str, key: str) -> list[str]:
    """The cells of a key's row, as they are read."""
    (line,) = [line for line in page.splitlines() if line.startswith(f"| <code>{key.replace('_', '&#95;')}</code> |")]
    plain = re.sub(r"&#(\d+);", lambda code: "\0" if code[1] == "124" else chr(int(code[1])), re.sub(r"</?code>", "", line))
    return [cell.strip().replace("\0", "|") for cell in plain.split("|")[2:-1]]


def test_the_navigation_has_every_page(keys) -> None:
    listed = [page for part in SITE["nav"] for pages in part.values() for page in pages]
    made = [f"configuration/{name}.md" for name in keys.TITLES] + [f"api/{name}.md" for name in hook("interface").MODULES]
    found = [page.name for page in (ROOT / "docs").glob("*.md")]
    notebooks = [hook("links").place_of(page) for page in (ROOT / "notebooks").glob("*.ipynb")]
    assert sorted(listed) == sorted([*found, *made, *notebooks, "overview.md"])


def test_nothing_is_loaded_from_another_host() -> None:
    assert "//" not in TEXT
    assert SITE["theme"]["font"] is False


def test_hooks_and_the_folder_of_the_site_are_where_they_are_said_to_be() -> None:
    assert all((ROOT / name).is_file() for name in SITE["hooks"])
    assert f"/{SITE['site_dir']}/" in (ROOT / ".gitignore").read_text().splitlines()
    assert {name.split("/")[-1] for name in SITE["hooks"]} == {file.name for file in (ROOT / "docs/site").glob("*.py")}


def test_keys_are_those_of_the_parser(pages) -> None:
    assert row(pages["model"], "group") == ["int", "8", "G, captions per image, 2 or more."]
    assert row(pages["model"], "sampling.max_tokens")[:2] == ["int", "64"]
    assert row(pages["model"], "correction.high")[:2] == ["float", "2.0"]
    assert row(pages["losses"], "delta")[:2] == ["float | None", "null"]
    assert row(pages["trainer"], "trainer.max_steps")[:2] == ["int", "-1"]
    assert row(pages["run"], "run_name")[0] == "str"


def test_every_class_of_the_configurations_has_its_keys(keys, pages) -> None:
    assert all(f"## {path}\n" in pages[keys.page_of(path)] for path in keys.class_paths())
    with pytest.raises(ValueError, match=r"names elsewhere\.Thing, which has no page"):
        keys.page_of("elsewhere.Thing")


def test_every_key_of_this_project_has_a_meaning(pages) -> None:
    sections = [part.removeprefix("# ") for page in pages.values() for part in page.split("\n## ")]
    sections = [part for part in sections if part.startswith(("uae.", "callbacks.", "Keys of a run"))]
    rows = [line for part in sections for line in part.splitlines() if line.startswith("| <code>")]
    assert len(rows) > 300
    assert [line for line in rows if line.endswith("|  |")] == []


def test_links_of_the_repository_lead_to_the_same_file_on_the_site() -> None:
    links = hook("links")
    links.SOURCES["method.md"] = ROOT / "docs/method.md"
    links.SOURCES["benchmarks/results/claims.md"] = ROOT / "benchmarks/results/claims.md"

    class Page:
        def __init__(self, place):
            self.file = self
            self.src_uri = place

    def translated(place, text):
        return links.on_page_markdown(text, Page(place))

    assert translated("method.md", "[a](losses.md#b)") == "[a](losses.md#b)"
    assert translated("method.md", "[a](../README.md)") == "[a](overview.md)"
    assert translated("method.md", "[a](../notebooks/03_unified_bench.ipynb)") == "[a](notebooks/03_unified_bench.md)"
    assert translated("benchmarks/results/claims.md", "[a](../../docs/results.md)") == "[a](../../results.md)"
    assert translated("method.md", "[a](http://b/c.md) x[0](y)") == "[a](http://b/c.md) x[0](y)"

"""The documentation builds without a warning, and every page, link and anchor is there."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import expo_serve
from tests.docs.pages import ALL, DOCS, PAGES, ROOT, Page, page

SOURCES = sorted(Path(expo_serve.__file__).parent.rglob("*.py"))


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build a site as `make docs` does."""
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(site),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT)


def settings() -> dict[str, object]:
    """The settings of the site, but for what belongs to Python."""
    read: dict[str, object] = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    return read


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    result = build(ROOT / "mkdocs.yml", folder)
    assert result.returncode == 0, result.stderr
    assert "WARNING -" not in result.stderr
    return folder


def test_every_page_is_built(site: Path) -> None:
    built = {file.parent.relative_to(site).as_posix() for file in site.rglob("index.html")}
    assert built == {"." if one.path.stem == "index" else one.path.stem for one in PAGES}


def test_nothing_is_fetched_by_a_reader(site: Path) -> None:
    """Scripts, styles and images lie in the site itself."""
    for file in site.rglob("*.html"):
        for found in re.findall(r'<(?:script|link|img)\b[^>]*?(?:src|href)="(https?://[^"]+)"', file.read_text()):
            raise AssertionError(f"{file.name} fetches {found}")


def test_every_page_is_in_the_navigation() -> None:
    navigation = settings()["nav"]
    assert isinstance(navigation, list)
    assert sorted(name for entry in navigation for name in entry.values()) == [one.path.name for one in PAGES]


@pytest.mark.parametrize(
    "broken", ["[there](nowhere.md)", "[there](sources.md#nowhere)", "[there](#nowhere)", "![there](img/nowhere.svg)"]
)
def test_a_broken_link_fails_the_build(tmp_path: Path, broken: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# Title\n\n{broken}\n")
    (tmp_path / "docs/sources.md").write_text("# Sources\n")
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump({**settings(), "nav": ["index.md", "sources.md"]}))
    result = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert result.returncode != 0
    assert "nowhere" in result.stderr


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_links_within_the_repository_lead_somewhere(one: Page) -> None:
    """Pages of docs/ link within docs/ only: a built site has nothing else."""
    for target in one.links:
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (one.path.parent / path).resolve() if path else one.path
        assert file.exists(), target
        assert one.path.parent != DOCS or file.is_relative_to(DOCS), target
        assert not anchor or anchor in Page(file).anchors, target


def named_paths(text: str) -> Iterator[str]:
    """Yield what looks like a path of the repository."""
    top = "|".join(("expo_serve", "deploy", "docs", "tests", "loadtests", "requirements"))
    yield from (found.rstrip(".") for found in re.findall(rf"(?<![\w/.-])(?:{top})/[\w./-]*", text))


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_files_that_are_named_exist(one: Page) -> None:
    named = {path for span in one.spans for path in named_paths(span)}
    assert not [path for path in named if not (ROOT / path).exists()]


def test_a_file_that_does_not_exist_is_found() -> None:
    assert list(named_paths("see expo_serve/no/such.py, or deploy/x.")) == ["expo_serve/no/such.py", "deploy/x"]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_pages_that_the_code_points_to_exist(file: Path) -> None:
    for name, anchor in re.findall(r"docs/([\w-]+\.md)(?:#([\w-]+))?", file.read_text()):
        assert not anchor or anchor in page(name).anchors, f"docs/{name}#{anchor}"


def test_measurements_have_the_anchors_that_docstrings_use() -> None:
    wanted = {"reading", "read-ahead", "threads", "sizes", "kernels", "packed", "low-rank", "staging"}
    assert wanted <= page("performance.md").anchors


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_pages_look_the_same_on_hosting_sites(one: Page) -> None:
    """Without the syntax that only mkdocs knows: anchors given in headings, admonitions."""
    assert not re.search(r"^(#+ .*\{ ?#|!!! )", one.text, re.MULTILINE)

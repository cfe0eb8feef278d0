"""The pages of the documentation, and what can be taken out of their Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (?P<text>.*?)$", re.MULTILINE)


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    path: Path

    @property
    def name(self) -> str:
        """Path within the repository."""
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        """The whole file."""
        return self.path.read_text()

    @cached_property
    def prose(self) -> str:
        """The file without its code blocks."""
        return _FENCE.sub("", self.text)

    def code(self, *languages: str) -> list[str]:
        """Return the contents of the code blocks of these languages."""
        return [block["code"] for block in _FENCE.finditer(self.text) if block["language"] in languages]

    @property
    def commands(self) -> Iterator[str]:
        """Command lines of the shell blocks: continued lines are joined, comments and variables are cut off."""
        for block in self.code("sh"):
            for line in block.replace("\\\n", " ").splitlines():
                command = re.sub(r"\s#.*$", "", re.sub(r"^(\s*[A-Z_]+=\S+)+\s", "", f" {line}".rstrip() + " ")).strip()
                if command and not command.startswith("#"):
                    yield command

    @property
    def spans(self) -> list[str]:
        """Code within lines of prose."""
        return _SPAN.findall(self.prose)

    @property
    def links(self) -> list[str]:
        """Targets of links and images."""
        return [link["target"] for link in _LINK.finditer(self.prose)]

    @property
    def anchors(self) -> set[str]:
        """Anchors of the headings, as both mkdocs and hosting sites make them."""
        return {
            re.sub(r"[^\w\- ]", "", heading["text"].lower()).strip().replace(" ", "-")
            for heading in _HEADING.finditer(self.prose)
        }

    def section(self, heading: str) -> str:
        """Return the text below a heading, up to the next heading of its level or above."""
        match = re.search(rf"^(#+) {re.escape(heading)}$\n", self.text, re.MULTILINE)
        assert match, f"{self.name} has no heading {heading!r}"
        rest = self.text[match.end() :]
        end = re.search(rf"^#{{1,{len(match[1])}}} ", rest, re.MULTILINE)
        return rest[: end.start()] if end else rest


def rows(text: str) -> list[list[str]]:
    """Return the cells of all tables in a text, without headings."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line, following in zip(lines, [*lines[1:], ""], strict=True)
        if not following.startswith("|---") and not line.startswith("|---")
    ]


README = Page(ROOT / "README.md")
PAGES = tuple(Page(path) for path in sorted(DOCS.glob("*.md")))
ALL = (README, *(Page(ROOT / name) for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")), *PAGES)


def page(name: str) -> Page:
    """Return a page of docs/ by its file name."""
    return next(one for one in PAGES if one.path.name == name)

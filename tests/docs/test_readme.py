"""The README is short, and the project's other files say what they must."""

from __future__ import annotations

import json
import re
import shlex

import yaml

from tests.docs.pages import PAGES, README, ROOT, rows


def test_readme_is_short() -> None:
    assert len(README.text.encode()) <= 8192


def test_readme_gives_the_status_before_anything_else() -> None:
    status, first_heading = README.text.index("**Status.**"), README.text.index("\n## ")
    assert status < first_heading
    assert "CUDA has never been run" in README.text[status:first_heading]
    assert "not released" in README.text[status:first_heading]


def test_readme_links_to_every_page() -> None:
    linked = {target for target in README.links if target.startswith("docs/")}
    assert {f"docs/{one.path.name}" for one in PAGES} - linked == {"docs/index.md"}


def test_figures_are_few_and_one_number_a_cell() -> None:
    figures = rows(README.section("What it costs"))
    assert 0 < len(figures) <= 6
    assert all(re.fullmatch(r"\d+(\.\d+)?", value) for _, value in figures)


def test_kubernetes_takes_six_lines() -> None:
    section = README.section("On Kubernetes")
    (code,) = README.code("yaml")
    assert code in section
    assert len(code.splitlines()) + len(re.findall(r"^(?:make|helm) .*$", section, re.MULTILINE)) <= 6


def test_changelog_is_short() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    newest = re.split(r"^## .*$", text, flags=re.MULTILINE)[1]
    assert 0 < len(newest.strip().splitlines()) <= 15


def test_pre_commit_runs_what_make_lint_runs() -> None:
    settings = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (hook,) = (hook for repository in settings["repos"] for hook in repository["hooks"])
    assert shlex.split(hook["entry"]) == ["make", "lint"]
    assert hook["language"] == "system"
    assert not hook["pass_filenames"]
    assert all(re.search(hook["files"], name) for name in ("expo_serve/errors.py", "pyproject.toml", "Makefile"))


def test_workflow_runs_what_ci_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert all(re.search(r"@[0-9a-f]{40}$", step["uses"]) for step in job["steps"] if "uses" in step)
    assert workflow["permissions"] == {"contents": "read"}
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    assert json.dumps(workflow)


def test_glossary_has_some_thirty_words() -> None:
    words = re.findall(r"^(.+)\n:   ", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)
    assert 25 <= len(words) <= 40
    assert sorted(words, key=str.lower) == words

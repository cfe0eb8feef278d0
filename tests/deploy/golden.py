"""Renders that are kept: ``python -m tests.deploy.golden`` makes them anew, and a commit's diff shows what changed."""

from __future__ import annotations

from pathlib import Path

from tests.deploy.chart import Values, documents, load

FOLDER = Path(__file__).parent / "golden"
KEPT = ("one", "three", "everything")


def text(values: Values) -> str:
    """All objects in one file, in the order of the render; not the dashboard, which is a file of its own already."""
    kept = [document for (kind, _), document in documents(values).items() if kind != "ConfigMap"]
    return "".join(f"---\n{document.rstrip()}\n" for document in kept)


def path(name: str) -> Path:
    """Where the render of a values file is kept."""
    return FOLDER / f"{name}.yaml"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for kept in KEPT:
        path(kept).write_text(text(load(kept)))

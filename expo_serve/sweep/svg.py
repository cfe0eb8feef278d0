"""Turns a figure into SVG that is a part of the page: in the page's font and in the colours of its theme."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from io import StringIO
from typing import Any
from xml.etree import ElementTree

from expo_serve.sweep.plots import POINT, Chart, Palette

_INCHES = (3.9, 3.1)
"""So small that labels can be read where the figure is as wide as a phone."""
_COLOURS = {field.name: f"#0a0b{number:02x}" for number, field in enumerate(fields(Palette))}
"""Drawn with these, which nothing else has, and replaced by the variables ``--chart-...`` of the page's stylesheet."""
_FONT = re.compile(r"font-family:[^;]*;?")
_REFERENCE = re.compile(r"#([\w-]+)")


def chart_svg(chart: Chart, tips: Mapping[int, str]) -> str:
    """Draw a figure as an ``svg`` element for HTML.

    Args:
        chart: what to draw.
        tips: what is to be said of an alpha, by its index; the alpha's mark gets it as ``data-tip``.
    """
    root = ElementTree.fromstring(_draw(chart))
    _strip(root)
    _name_points(root, tips)
    _rename(root, f"{re.sub(r'[^a-z0-9]', '-', chart.name.lower())}-")
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"aria-hidden": "true", "focusable": "false"}
    text = _FONT.sub("", ElementTree.tostring(root, encoding="unicode"))
    for name, colour in _COLOURS.items():
        text = text.replace(colour, f"var(--chart-{name})")
    return text


def _draw(chart: Chart) -> str:
    matplotlib: Any = import_module("matplotlib")
    figures: Any = import_module("matplotlib.figure")
    file = StringIO()
    # Text stays text, and the same figure has the same ids.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.name}):
        figure = figures.Figure(figsize=_INCHES, layout="constrained")
        chart.draw(figure.subplots(), Palette(**_COLOURS))
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _strip(root: ElementTree.Element) -> None:
    """Take out spaces, styles that would hold everywhere, and namespaces, which HTML gives ``svg`` by itself."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        element.tail = None
        if element.tag != "text":
            element.text = None
    for parent in root.iter():
        for child in [child for child in parent if child.tag in ("metadata", "style")]:
            parent.remove(child)


def _name_points(root: ElementTree.Element, tips: Mapping[int, str]) -> None:
    for element in root.iter():
        name = element.get("id", "")
        if name.startswith(POINT):
            del element.attrib["id"]
            element.attrib |= {"class": "point", "data-tip": tips[int(name.removeprefix(POINT))]}


def _rename(root: ElementTree.Element, prefix: str) -> None:
    """Keep the ids that something refers to, under names that no other figure has."""
    used = {name for element in root.iter() for text in element.attrib.values() for name in _REFERENCE.findall(text)}
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        for name, text in element.attrib.items():
            if name == "id":
                element.set(name, prefix + text)
            elif name == "href" or "url(#" in text:
                element.set(name, text.replace("#", f"#{prefix}"))

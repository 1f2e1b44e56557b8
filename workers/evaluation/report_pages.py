"""How the report's HTML is made: templates, and charts and pictures as data within the page."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from workers.evaluation.pictures import png_uri
from workers.evaluation.style import DPI

CSS_DPI = 96
ENLARGED = 1.1  # on a screen; figures are drawn for the narrower columns of paper


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure in both themes, as PNG."""

    light: bytes
    dark: bytes


@cache
def environment() -> Environment:
    """Where the templates are; what they are given is escaped."""
    return Environment(
        loader=PackageLoader("workers.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def embed(chart: Chart) -> dict[str, Any]:
    """The chart as data URIs, and its width in CSS pixels."""
    # a PNG states its width in these bytes
    width = int.from_bytes(chart.light[16:20], "big")
    return {
        "light": png_uri(chart.light),
        "dark": png_uri(chart.dark),
        "width": round(width * CSS_DPI * ENLARGED / DPI),
    }

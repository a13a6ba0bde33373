"""A self-contained HTML page: its templates, its figures, and how it is written.

The page needs no network: plotly.js is inlined once, and a content security policy forbids
every request. All text from MLflow is escaped: by jinja2 in the markup, by those who draw inside
the figures, and by `embedded` in the JSON that carries them. Nothing on a page depends on the
time at which it was made, so the same records give the same page.
"""

from __future__ import annotations

import json
import os
import tempfile
from html import unescape
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from analysis.style import theme
from analysis.words import (
    ENDING_LABELS,
    format_count,
    format_duration,
    format_setting,
    format_value,
)


class Figures:
    """The figures of one page, by their ids, and the tables that the browser shows in parts."""

    def __init__(self) -> None:
        self.drawn: dict[str, Any] = {}
        self.boards: dict[str, Any] = {}

    def add(self, key: str, figure: go.Figure, caption: str = "") -> dict[str, Any]:
        """Enter a figure under its id; the answer is what the macro `figure` takes.

        The title goes into the page, where it can wrap.
        """
        assert key not in self.drawn, key
        drawn = json.loads(figure.to_json())
        layout = drawn["layout"]
        title = layout.pop("title", {}).get("text", "")
        layout.pop("template", None)
        layout.setdefault("margin", {})["t"] = 40 if layout.get("showlegend") else 14
        self.drawn[key] = drawn
        # who draws escapes for plotly; the template escapes again for the page
        return {
            "id": key,
            "title": unescape(title),
            "caption": caption,
            "height": layout["height"],
        }


def render(template: str, figures: Figures, **values: Any) -> str:
    """A page's HTML from a template in analysis/templates."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "value": format_value,
        "count": format_count,
        "duration": format_duration,
        "setting": format_setting,
        "wrapping": wrapping,
    }
    return environment.get_template(template).render(
        figures=embedded(figures.drawn),
        boards=embedded(figures.boards),
        themes=embedded({"light": theme(dark=False), "dark": theme(dark=True)}),
        plotly_js=get_plotlyjs(),
        labels=ENDING_LABELS,
        **values,
    )


def wrapping(name: object) -> Markup:
    """A name, escaped, that may break after each underscore, so that columns can be narrow."""
    return Markup("_<wbr>").join(escape(part) for part in str(name).split("_"))


def embedded(content: Any) -> str:
    """JSON that can stand in a script element: no character in it can end the element."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def write_atomic(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all, with the rights that the umask leaves."""
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(beside, 0o666 & ~umask)  # mkstemp's own mode would hide the page from colleagues
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise

"""The part of the page on what the best trials learned: maps of features, neighbours, views."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

import plotly.graph_objects as go

from analysis.artifacts import (
    About,
    FeatureMap,
    FeatureMaps,
    Neighbours,
    SweepPictures,
    TrialPictures,
    Views,
    load_pictures,
    sheet_size,
)
from analysis.frames import SweepFrames
from analysis.page import Figures
from analysis.style import BLUE, GREY, ORANGE, SERIES_COLOURS, finish
from analysis.tables import best_completed

__all__ = ["SweepPictures", "load_pictures", "map_figure", "pictures_section"]

NAMED_CLASSES = 10
SYMBOLS = (
    *("circle", "square", "diamond", "cross", "triangle-up"),
    *("triangle-down", "star", "x", "pentagon", "hexagram"),
)
"""One for each named class; of the five colours two classes share each."""
RAMP = [[0.0, BLUE], [0.5, GREY], [1.0, ORANGE]]
"""Of the classes without a name, by their numbers; no end of it vanishes in the dark."""
LEGEND_CHARACTERS = 14
"""Two columns of the legend fit a telephone."""
PIXELATED_BELOW = 64
"""Side of images (pixels) whose thumbnails are enlarged, and are to keep their edges."""
METHODS = {"pca": "PCA", "umap": "UMAP"}


def pictures_section(
    pictures: SweepPictures | None,
    figures: Figures,
    prefix: str,
    frames: SweepFrames | None = None,
) -> dict[str, Any] | None:
    """What the template `pictures.html.j2` reads; None without pictures and notes.

    With `frames` it is told where other trials are the best by now than those in the pictures.
    """
    if pictures is None or not (pictures.trials or pictures.notes):
        return None
    notes = list(pictures.notes)
    trials = []
    for each in pictures.trials:
        about, number = each.about, each.about.trial
        notes += [f"Trial {number}: {text}" for text in about.left_out]
        trials.append(
            {
                "number": number,
                "about": about,
                "maps": [
                    figures.add(
                        f"{prefix}-map-{number}-{found.method}",
                        map_figure(found, each.maps, about),
                        _map_caption(found, each.maps, about),
                    )
                    for found in each.maps.maps
                ],
                "neighbours": {
                    **_image(each.neighbours_png, about),
                    "alt": _neighbours_in_words(each.neighbours),
                    "caption": _neighbours_caption(each),
                    "rows": _neighbour_rows(each.neighbours),
                },
                "views": {
                    **_image(each.views_png, about),
                    "alt": "In each row a validation image as it is, then views of it",
                    "caption": _views_caption(about.views),
                },
            }
        )
    shown = [each.about.trial for each in pictures.trials]
    best = shown if frames is None else best_completed(frames)[: len(shown)]
    return {"trials": trials, "notes": notes, "overtaken_by": best if best != shown else []}


def map_figure(found: FeatureMap, maps: FeatureMaps, about: About) -> go.Figure:
    """One marker an image: the ten most frequent classes by name, the others by a colour ramp."""
    figure = go.Figure()
    if maps.labels is None:
        figure.add_trace(_markers(found, list(range(len(found.x))), "images", SERIES_COLOURS[0]))
    else:
        rows: dict[int, list[int]] = {}
        for row, label in enumerate(maps.labels):
            rows.setdefault(label, []).append(row)
        frequent = sorted(rows, key=lambda label: (-len(rows[label]), label))[:NAMED_CLASSES]
        others = [row for label in sorted(rows) if label not in frequent for row in rows[label]]
        if others:
            labels = [maps.labels[row] for row in others]
            trace = _markers(found, others, "other classes", labels)
            trace.marker.update({"colorscale": RAMP, "opacity": 0.5, "size": 5})
            trace.update(text=[escape(_short(maps.classes[label])) for label in labels])
            trace.update(hovertemplate="%{text}<extra></extra>")
            _name_classes(trace, [maps.classes[label] for label in labels])
            figure.add_trace(trace)
        for place, label in enumerate(sorted(frequent)):
            colour = SERIES_COLOURS[place % len(SERIES_COLOURS)]
            name = maps.classes[label]
            trace = _markers(found, rows[label], name, colour, SYMBOLS[place])
            _name_classes(trace, [name] * len(rows[label]))
            figure.add_trace(trace)
    method = METHODS[found.method]
    x, y = (
        f"{method} {axis + 1}"
        + ("" if found.explained is None else f", {found.explained[axis]:.0%} of the variance")
        for axis in (0, 1)
    )
    finish(figure, title=f"Features of trial {about.trial}, {method}", x=x, y=y, height=440)
    figure.update_layout(
        showlegend=maps.labels is not None, legend={"font": {"size": 11}, "itemwidth": 30}
    )
    figure.update_yaxes(scaleanchor="x")  # distances mean the same either way
    return figure


def _markers(
    found: FeatureMap, rows: list[int], name: str, colour: Any, symbol: str = "circle"
) -> go.Scatter:
    return go.Scatter(
        x=[found.x[row] for row in rows],
        y=[found.y[row] for row in rows],
        mode="markers",
        name=escape(_short(name, LEGEND_CHARACTERS)),
        marker={"color": colour, "symbol": symbol, "size": 7, "opacity": 0.8},
        hovertemplate=f"{escape(_short(name))}<extra></extra>",
    )


def _name_classes(trace: go.Scatter, names: list[str]) -> None:
    """Enter each marker's class, uncut, for the CSV of the figure."""
    trace.update(customdata=names, meta=["class"])


def _map_caption(found: FeatureMap, maps: FeatureMaps, about: About) -> str:
    text = (
        f"n = {about.images:,} of {about.val_images:,} validation images, a marker each, as the "
        f"encoder {about.encoder} sees them after {about.mark:,} images. "
    )
    if found.explained is not None:
        text += (
            f"Of the {about.features} dimensions of their features, at length 1, these two axes "
            f"hold {sum(found.explained):.0%} of the variance; what overlaps here may be apart on "
            "others."
        )
    else:
        text += "Neighbours stay neighbours here; gaps between groups and their sizes mean little."
    count = 0 if maps.labels is None else len(set(maps.labels))
    if count > NAMED_CLASSES:
        text += f" Named are the {NAMED_CLASSES} most frequent of {count} classes."
    return text


def _image(png: bytes, about: About) -> dict[str, Any]:
    width, height = sheet_size(png)
    return {
        "src": "data:image/png;base64," + base64.b64encode(png).decode("ascii"),
        "width": width,
        "height": height,
        "pixelated": about.image_size < PIXELATED_BELOW,
    }


def _neighbours_caption(each: TrialPictures) -> str:
    found, about = each.neighbours, each.about
    widest = max((len(row) for row in found.neighbours), default=0)
    text = (
        f"Left: {len(found.rows)} validation images, drawn at random. Beside each the {widest} "
        f"nearest to it of n = {about.images:,}, by the cosine of their features, nearest first."
    )
    if found.labels is not None:
        same = sum(label == row[0] for row in found.labels for label in row[1:])
        text += (
            f" Solid frame: the same class; dashed: another one. {same} of "
            f"{sum(len(row) - 1 for row in found.labels)} are of the same class, an impression "
            "of few images and no measure."
        )
    return text


def _views_caption(views: Views) -> str:
    drawn = [f"{name} {chance:.0%}" for name, chance in views.chances.items()]
    if not drawn:
        return "Left: validation images as they are. No augmentation: the views equal them."
    text = (
        "Left: validation images as they are. Beside each, views as training drew them. "
        f"Chances: {', '.join(drawn)}. Strength of colour {views.strength:.3g}"
    )
    if "crop" in views.chances:
        text += f", crops of at least {views.crop_min_scale:.0%} of the area"
    return text + "."


def _neighbour_rows(found: Neighbours) -> list[dict[str, Any]]:
    """A row an image: its class, and of each neighbour class, whether it is the same, cosine."""
    rows = []
    for place, cosines in enumerate(found.cosine):
        labels = None if found.labels is None else found.labels[place]
        names = [found.classes[label] for label in labels] if labels else []
        rows.append(
            {
                "name": names[0] if names else f"image {found.rows[place]}",
                "neighbours": [
                    {
                        "name": names[column + 1] if names else "",
                        "same": labels[column + 1] == labels[0] if labels else None,
                        "cosine": cosine,
                    }
                    for column, cosine in enumerate(cosines)
                ],
            }
        )
    return rows


def _neighbours_in_words(found: Neighbours) -> str:
    if found.labels is None:
        return "In each row a validation image, then its nearest neighbours"
    lines = [
        f"{_short(found.classes[row[0]])}: "
        + ", ".join(_short(found.classes[label]) for label in row[1:])
        for row in found.labels
    ]
    return f"In each row a validation image, then its nearest neighbours. {'; '.join(lines)}"


def _short(name: str, most: int = 40) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"

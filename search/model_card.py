"""The model card: what an exported encoder is, how good, how it is used, and what it is not for.

Markdown, after Mitchell et al. 2018 (https://arxiv.org/abs/1810.03993). All text that comes from
users or their data is escaped, so that it is shown and never is markup.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

MOST_CHARACTERS = 200
"""Of a name that comes from the user."""
NOTE_CHARACTERS = 1000
MEASURES = {
    "knn_top1": "kNN accuracy (k = 20)",
    "linear_top1": "linear probe accuracy",
    "top1": "accuracy of the adapted classifier, which is not exported",
    "balanced_top1": "its mean recall over the classes",
    "rankme": "effective rank (RankMe)",
}
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+\-!|~>:@])")


def escaped(value: object, most: int = MOST_CHARACTERS) -> str:
    """Text on one line that Markdown and HTML show as it is, cut to `most` characters."""
    text = " ".join(str(value).split())
    text = text if len(text) <= most else f"{text[:most]}..."
    return _MARKUP.sub(r"\\\1", html.escape(text, quote=False))


def _code(value: object) -> str:
    """Hexadecimal digits and the like, between backticks."""
    return re.sub(r"[^\w.+-]", "", str(value))[:MOST_CHARACTERS]


def model_card(about: Mapping[str, Any]) -> str:
    """The card of what `model.json` says."""
    parts = (_head, _figures, _use, _preprocessing, _data, _training, _limits)
    lines = [line for part in parts for line in part(about)]
    return "\n".join(lines) + "\n"


def _head(about: Mapping[str, Any]) -> Iterator[str]:
    source = about["source"]
    yield f"# Image encoder {escaped(about['encoder'])}"
    yield ""
    yield (
        f"Encodes square images of {about['image_size']} pixels as {about['feature_dim']} numbers "
        f"each. {_trained(about['config'])} {escaped(about['data']['name'])} by contrasweep"
        f", with {source['samples_seen']:,} images seen."
    )
    yield ""
    yield f"- origin: {_origin(source)}"
    yield f"- model: `{about['model']}`"
    for name, each in about["files"].items():
        differs = each["largest_difference"]
        note = f", differs from the trainer by at most {differs:.1e}" if differs else ""
        yield f"- `{each['file']}`: {name}, {each['bytes'] / 1e6:.1f} MB{note}"


def _uses_labels(config: Mapping[str, Any]) -> bool:
    return config["loss"] == "sup_con" or config.get("task") == "finetune"


def _trained(config: Mapping[str, Any]) -> str:
    adapted = {
        "linear": "Left as it was while a linear classifier was fitted on",
        "finetune": "Fine-tuned to the labels of",
    }
    if config.get("task") in adapted:
        return adapted[config["task"]]
    return "Pre-trained with labels on" if _uses_labels(config) else "Pre-trained without labels on"


def _origin(source: Mapping[str, Any]) -> str:
    if source["kind"] == "run":
        return f"the run {escaped(source['name'])}"
    trial = f"trial {source['trial']}, {escaped(source['state'])}"
    if source["kind"] == "sweep":
        return f"the sweep {escaped(source['name'])}, {trial}"
    winner = ", the confirmed winner" if source["confirmed"] else ""
    return (
        f"the confirmation {escaped(source['name'])} of the sweep {escaped(source['sweep'])}, "
        f"configuration {escaped(source['candidate'])}{winner}, {trial}"
    )


def _figures(about: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", "## How good it is", "")
    figures, source = about["figures"], about["source"]
    for note in about.get("notes", ()):
        told = note[:1].upper() + note[1:]
        yield from (f"**Note:** {escaped(told, NOTE_CHARACTERS)}.", "")
    if figures:
        seeds = max(each["seeds"] for each in figures)
        yield (
            "The configuration, trained once after the search, with a fresh seed. What another "
            "seed would give is not known, so that there are no intervals."
            if seeds == 1
            else f"The configuration, trained with {seeds} fresh seeds after the search; in "
            "parentheses 95 % intervals over seeds and images. This file is one of these trainings"
            + (", the best on validation." if source["confirmed"] else ".")
        )
        yield from ("", "| measure | split | mean | seeds | images |", "|---|---|---|---|---|")
        for each in figures:
            name, split = _measure(each["name"])
            mean = f"{each['mean']:.4f}"
            if each["low"] is not None:
                mean += f" ({each['low']:.4f} to {each['high']:.4f})"
            yield f"| {name} | {split} | {mean} | {each['seeds']} | {each['images']:,} |"
        if source.get("searched_value") is not None:
            value = f"{source['searched_value']:.4f}"
            yield from ("", f"The search itself had found {value} on validation, by its own seed.")
        if source.get("test_uses", 1) > 1:
            uses = source["test_uses"]
            yield from ("", f"The test split was used {uses} times for this sweep.")
    elif about["metrics"]:
        yield "One training, measured once:"
        yield from ("", "| measure | split | value |", "|---|---|---|")
        for key, value in about["metrics"].items():
            name, split = _measure(key)
            yield f"| {name} | {split} | {value:.4f} |"
        if source["kind"] == "sweep":
            yield ""
            yield (
                "These are the search's own values on images that the choice was made by: "
                "optimistic, and not confirmed. `contrasweep confirm` trains and tests anew."
            )
    else:
        yield "These weights were not measured."


def _measure(key: str) -> tuple[str, str]:
    name = key.removeprefix("test_")
    return MEASURES.get(name, escaped(name)), "test" if key != name else "validation"


def _use(about: Mapping[str, Any]) -> Iterator[str]:
    files = about["files"]
    yield from ("", "## How to use it")
    if "safetensors" in files:
        yield from (
            *("", "From Python, with contrasweep:", "", "```python"),
            "from trainer import load_encoder",
            f'encoder = load_encoder("{files["safetensors"]["file"]}")',
            'features = encoder(encoder.transform("picture.jpg")[None])',
            "```",
        )
    pixels = "images: uint8 [N, 3, {0}, {0}], RGB".format(about["image_size"])
    if "onnx" in files:
        yield from (
            *("", "With ONNX Runtime, which normalises within:", "", "```python"),
            "import onnxruntime",
            f'session = onnxruntime.InferenceSession("{files["onnx"]["file"]}")',
            f'(features,) = session.run(None, {{"images": images}})  # {pixels}',
            "```",
        )
    if "torch" in files:
        yield from (
            *("", "With torch alone, which normalises within:", "", "```python"),
            "import torch",
            f'encoder = torch.export.load("{files["torch"]["file"]}").module()',
            f"features = encoder(images)  # {pixels}",
            "```",
        )
    yield ""
    yield (
        "Open `encoder.pt2` and MLflow's model only from those you trust, as both can run code; "
        "`encoder.safetensors` holds numbers alone."
    )


def _preprocessing(about: Mapping[str, Any]) -> Iterator[str]:
    size = about["image_size"]
    mean, std = (", ".join(f"{v:.6g}" for v in about[name]) for name in ("mean", "std"))
    yield from (
        *("", "## Preprocessing", ""),
        "1. upright by its EXIF orientation, RGB, transparency on white",
        f"2. centre square, resized to {size} x {size} pixels (bicubic, antialiased)",
        f"3. divided by 255, less the mean ({mean}), divided by the deviation ({std})",
        "",
        "`transform` does all of it; the programs in ONNX and torch's format do the third step.",
    )


def _data(about: Mapping[str, Any]) -> Iterator[str]:
    data = about["data"]
    yield from ("", "## Data", "", f"- {escaped(data['name'])}")
    for key, text in (("train", "training"), ("val", "validation"), ("test", "test")):
        if key in data:
            yield f"- {data[key]:,} {text} images"
    if "classes" in data:
        yield f"- {data['classes']:,} classes"
    yield f"- digest `{_code(data.get('digest'))}`"


def _training(about: Mapping[str, Any]) -> Iterator[str]:
    config = json.dumps(about["config"], indent=2)
    yield from ("", "## Training", "", "```json", *config.splitlines(), "```", "")
    for what in ("trained", "exported"):
        found = about[f"{what}_with"]
        listed = ", ".join(f"{name} {version}" for name, version in found.items())
        commit = about[f"{what}_commit"]
        if listed or commit:
            yield f"- {what} with {escaped(listed or 'unknown versions')}" + (
                f"; commit `{_code(commit)}`" if commit else ""
            )


def _limits(about: Mapping[str, Any]) -> Iterator[str]:
    name = escaped(about["data"]["name"])
    supervised = _uses_labels(about["config"])
    tested = any(key.startswith("test_") for key in about["metrics"]) or any(
        each["name"].startswith("test_") for each in about["figures"]
    )
    yield from ("", "## Limits", "")
    yield (
        "- Its features are what training on images "
        + (
            "and their labels left in them"
            if supervised
            else "alone left in them: no label told what matters"
        )
        + ". A classifier on top has to be trained and tested for its task."
    )
    yield (
        f"- It was tested on images of {name} alone, not on others: not on other cameras, places, "
        "sizes or damage, not for fairness between groups of people, not against attacks."
        if tested
        else "- It was not tested on images that were held out from all choices."
    )
    yield "- Whatever is wrong or missing in the training images is so in the features."

"""`contrasweep export`: the encoder that a sweep or run ends with, in files and in MLflow.

A composition root as `search.cli` is: intervals of a confirmation's figures are `analysis`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search.console import err_console, out_console, print_json
from search.options import CacheDir, Download, Json

if TYPE_CHECKING:
    from search.model_export import Chosen, Model

FOLDER = "export"

exporting = typer.Typer()


@exporting.command()
def export(
    directory: Annotated[
        Path,
        typer.Argument(metavar="RUNS/NAME", help="A sweep, a confirmation, or a run of train."),
    ],
    trial: Annotated[
        int | None,
        typer.Option(min=0, help="(default: the confirmed winner, else the best completed)"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="(default: export in that folder)")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="NAME[,NAME...]",
            help="Of safetensors, onnx and torch. (default: safetensors)",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the export of another model in that folder.")
    ] = False,
    mlflow: Annotated[
        bool,
        typer.Option("--mlflow/--no-mlflow", help="Log the encoder as a model of its trial's run."),
    ] = True,
    register: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Register that model; a confirmed winner gets the alias 'confirmed'.",
        ),
    ] = None,
    download: Download = False,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Write an encoder with its preprocessing and a model card, and log it as a model."""
    from search.model_card import model_card
    from search.model_export import (
        CARD,
        check_folder,
        check_formats,
        model_to_export,
        read_model,
        write_export,
    )
    from search.progress import DataProgress
    from search.registry import check_name

    wanted = check_formats(formats or [])
    if register is not None:
        check_name(register)
        if not mlflow:
            raise ValueError("--register needs the model in MLflow; leave out --no-mlflow")
    chosen = model_to_export(directory, trial)
    folder = (out or directory / FOLDER).expanduser().resolve()
    progress = DataProgress(err_console)
    model = read_model(chosen, download=download, cache_dir=cache_dir, progress=progress)
    check_folder(folder, model.about["model"], force=force)
    _enter_figures(model)
    about = write_export(model, folder, wanted, model_card, force=force)
    answer: dict[str, Any] = {
        "dir": str(folder),
        "model": about["model"],
        "source": about["source"],
        "confirmed": about["source"]["confirmed"],
        "figures": about["figures"],
        "metrics": about["metrics"],
        "notes": about["notes"],
        "files": {name: str(folder / each["file"]) for name, each in about["files"].items()},
        "largest_difference": {
            name: each["largest_difference"] for name, each in about["files"].items()
        },
        "card": str(folder / CARD),
        "mlflow": None,
        "registered": None,
    }
    if mlflow and (register is not None or chosen.trial is not None):
        answer |= _record(chosen, model, model_card(about), register)
    for note in filter(None, (chosen.note, *about["notes"])):
        err_console.print(note, soft_wrap=True)
    if as_json:
        print_json(answer)
        return
    _print(answer)


def _enter_figures(model: Model) -> None:
    """Of a trial of a confirmation, what all seeds of its configuration came to, with intervals."""
    if model.record is None:
        return
    source = model.about["source"]
    own = next(c for c in model.record["candidates"] if c["name"] == source["candidate"])
    source["searched_value"] = own["searched_value"]
    source["test_uses"] = model.record["ordinal"]
    model.about["figures"] = figures_of(model.record, source["candidate"])
    model.about["notes"] += comparison_notes(model.record, source)


def figures_of(record: Mapping[str, Any], candidate: str) -> list[dict[str, Any]]:
    """Mean and interval of each accuracy of a candidate, over its completed seeds and images.

    Of one seed there is no interval: that of its images leaves out what another seed would change.
    """
    import numpy as np

    from analysis.confirmation_record import unpacked
    from analysis.crossed import mean_interval

    trainings = [
        each["correct"]
        for each in record["trials"]
        if each["candidate"] == candidate and each["state"] == "completed" and "correct" in each
    ]
    figures = []
    for name in trainings[0] if trainings else ():
        split = "test" if name.startswith("test_") else "val"
        images = record[f"{split}_images"]
        rows = [unpacked(each[name], images) for each in trainings if name in each]
        found = mean_interval(np.stack(rows))
        figures.append(
            {
                "name": name,
                "mean": found.mean,
                "low": found.low if found.covers_seeds else None,
                "high": found.high if found.covers_seeds else None,
                "level": found.level,
                "seeds": found.seeds,
                "images": found.images,
            }
        )
    return figures


def comparison_notes(record: Mapping[str, Any], source: Mapping[str, Any]) -> list[str]:
    """What test says against a candidate: that the baseline is better, or that there is only it.

    The winner is chosen without test, which therefore may say so, and does not choose another.
    """
    import pandas as pd

    from analysis.confirmation import Confirmation, summarise_confirmation
    from analysis.confirmation_record import parse_record

    try:
        parsed = parse_record(json.dumps(record).encode())
    except ValueError as error:
        return [f"it is not compared with the baseline: {error}"]
    confirmation = Confirmation(
        name=source["name"],
        sweep_id=source["sweep_id"],
        run_id="",
        state="finished",
        start=pd.Timestamp.now(tz="UTC"),
        record=parsed,
        searched_images=parsed.searched_images,
        total_images=parsed.total_images,
    )
    summary = summarise_confirmation(confirmation)
    name, baseline, winner = source["candidate"], summary["baseline"], summary["winner"]
    wins = winner is not None and winner["candidate"] == name
    if wins and not summary["candidates"][name]["top"]:
        return [f"none of the sweep's best configurations was completed, only {name}, the baseline"]
    for gap in summary["differences"]:
        if (gap["first"], gap["second"], gap["split"]) != (name, baseline, "test"):
            continue
        if gap["result"] == "worse":
            answers = confirmation.answers(baseline, summary["objective"])
            best = max(answers, key=lambda repeat: (float(answers[repeat].mean()), -repeat))
            number = confirmation.trainings(baseline)[best].number
            inside = f"95 % interval {-100 * gap['high']:.1f} to {-100 * gap['low']:.1f}"
            return [
                f"{name} is worse than the baseline, {baseline}, on test by "
                f"{-100 * gap['mean']:.1f} points ({inside}); consider --trial {number} of "
                f"{source['name']}, the baseline's best training on validation"
            ]
    return []


def _record(chosen: Chosen, model: Model, card: str, name: str | None) -> dict[str, Any]:
    """Log and register; what MLflow refuses costs a note unless the user asked for a name."""
    from search.mistakes import mistake_in
    from search.registry import ALIAS, log_model, register
    from search.uris import without_credentials

    confirmed = bool(model.about["source"]["confirmed"])
    try:
        uri, runs = _store(chosen)
        logged = log_model(uri, model.encoder, model.about, card, runs)
        registered = None
        if name is not None:
            version = register(uri, name, logged["model_id"], logged["run_id"], confirmed=confirmed)
            registered = {"name": name, "version": version, "alias": ALIAS if confirmed else None}
    except (ValueError, OSError) as error:
        if name is not None:
            raise
        err_console.print(f"not in MLflow: {mistake_in(error)}", soft_wrap=True)
        return {}
    if registered and not confirmed:
        err_console.print(
            f"{name} has version {version} without the alias {ALIAS}: the model is not a "
            "confirmed winner",
            soft_wrap=True,
        )
    tracking = without_credentials(uri)
    model_uri = f"models:/{logged['model_id']}"
    if registered:
        model_uri = f"models:/{name}@{ALIAS}" if confirmed else f"models:/{name}/{version}"
    return {
        "mlflow": {"tracking_uri": tracking, "uri": model_uri, **logged},
        "registered": registered,
    }


def _store(chosen: Chosen) -> tuple[str, Path]:
    """Where MLflow has the trial, brought up to date; and the folder of sweeps."""
    from search.confirmation import runs_folder
    from search.uris import check_tracking_uri, credentials_into_environment, default_tracking_uri

    if chosen.trial is None:
        runs = chosen.directory.parent
        uri = credentials_into_environment(default_tracking_uri(runs))
        check_tracking_uri(uri)
        return uri, runs
    from search.run import Sweep

    sweep = Sweep.open(chosen.directory)
    sweep.record_rest()
    return sweep.tracking_uri, runs_folder(sweep.dir, sweep.config.confirmation)


def _print(answer: dict[str, Any]) -> None:
    for name, path in answer["files"].items():
        differs = answer["largest_difference"][name]
        note = f" (differs from the trainer by at most {differs:.1e})" if differs else ""
        out_console.print(f"{name}: {path}{note}", soft_wrap=True)
    out_console.print(f"card: {answer['card']}", soft_wrap=True)
    for each in answer["figures"]:
        known = each["low"] is not None
        interval = f" ({each['low']:.4f} to {each['high']:.4f})" if known else ""
        seeds = "1 seed" if each["seeds"] == 1 else f"{each['seeds']} seeds"
        out_console.print(f"{each['name']} {each['mean']:.4f}{interval}, {seeds}", soft_wrap=True)
    if answer["mlflow"]:
        uri, store = answer["mlflow"]["uri"], answer["mlflow"]["tracking_uri"]
        out_console.print(
            f"serve it: MLFLOW_TRACKING_URI={store} mlflow models serve -m '{uri}' "
            "--env-manager local",
            soft_wrap=True,
        )

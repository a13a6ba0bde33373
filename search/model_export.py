"""A trial's checkpoint, or the folder of a run -> an encoder in files that others can use.

The encoder is that of a confirmed winner, else of the sweep's best completed trial, else of the
trial that is named. A folder of exports holds one model: `model.json` says which and what is known
of it, `MODEL_CARD.md` the same for people, and beside them is a file for each format. All is
written elsewhere first and checked; then each file takes its place whole.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.config import parse_sweep, read_sweep_yaml
from search.confirmed import (
    ConfirmedModel,
    confirmed_model,
    confirmed_winner,
    to_record,
    winner,
)
from search.folders import storage_of
from search.journal import FILE_NAME, load_state
from search.provenance import (
    describe_data,
    git_commit,
    held_in_memory,
    labelled_in_memory,
    versions,
)
from search.segments import CHECKPOINT_FILE
from search.state import SweepState, TrialState
from trainer.atomic import replacing

if TYPE_CHECKING:
    from search.config import SweepConfig
    from trainer.datasets import DataSplits
    from trainer.export import ExportedEncoder

SCHEMA = 1
"""Of `model.json`."""
ABOUT, CARD = "model.json", "MODEL_CARD.md"
FILES = {
    "safetensors": "encoder.safetensors",
    "onnx": "encoder.onnx",
    "torch": "encoder.pt2",
}
RUN_RESULT, RUN_PLAN = "result.json", "run.json"
TOLD_TRIALS = 20
TOLD_METRICS = ("knn_top1", "linear_top1", "top1", "balanced_top1", "rankme")


@dataclass(frozen=True)
class Chosen:
    """What is to be exported: a trial in a sweep's folder, or with none the encoder of a run."""

    directory: Path
    trial: int | None = None
    confirmed: ConfirmedModel | None = None
    """Of which it is the model; None: it is not a confirmed winner."""
    note: str = ""
    """What the user should know of the choice."""


@dataclass(frozen=True)
class Model:
    """An encoder and what is known of it, which `model.json` and the card tell."""

    encoder: ExportedEncoder
    about: dict[str, Any]
    record: dict[str, Any] | None = None
    """Of the confirmation that its trial belongs to."""


# ---- which


def model_to_export(directory: Path, trial: int | None = None) -> Chosen:
    """Choose; ValueError where there is nothing to export, or no such trial."""
    directory = directory.expanduser().resolve()
    if not (directory / FILE_NAME).is_file():
        return _run(directory, trial)
    state = load_state(directory / FILE_NAME)
    config = parse_sweep(state.header["config"])
    if config.confirmation is not None:
        return _of_confirmation(directory, state, config, trial)
    if trial is not None:
        return Chosen(directory, _known(state, directory, trial))
    confirmed = confirmed_winner(directory)
    if confirmed is not None:
        return Chosen(confirmed.directory, confirmed.trial, confirmed)
    best = state.best(config.objective, config.mode)
    if best is None or best.state != "completed":
        raise ValueError(
            f"{directory} has no completed trial; name one by --trial, or go on with "
            f"'contrasweep resume {directory}'"
        )
    note = (
        f"trial {best.number} is the best of the search and not confirmed: its value is "
        f"optimistic; 'contrasweep confirm {directory}' trains and tests it anew"
    )
    return Chosen(directory, best.number, note=note)


def _run(directory: Path, trial: int | None) -> Chosen:
    if not (directory / FILES["safetensors"]).is_file() or not (directory / RUN_PLAN).is_file():
        raise ValueError(
            f"{directory} is neither a sweep's folder (it has no {FILE_NAME}) nor that of a "
            f"finished 'contrasweep train' (no {FILES['safetensors']} and {RUN_PLAN})"
        )
    if trial is not None:
        raise ValueError(f"{directory} is one run and has no trials; leave out --trial")
    return Chosen(directory)


def _of_confirmation(
    directory: Path, state: SweepState, config: SweepConfig, trial: int | None
) -> Chosen:
    assert config.confirmation is not None
    finished = state.ended is not None and state.ended["state"] == "finished"
    best = winner(state, config) if finished else None
    if trial is None and best is None:
        raise ValueError(
            f"the confirmation {directory} has no winner yet; go on with "
            f"'contrasweep resume {directory}', or name one by --trial"
        )
    if best is not None and trial in (None, best.number):
        own = confirmed_model(directory, state, config)
        note = f"trial {best.number} is not confirmed: its configuration has one completed seed"
        return Chosen(directory, best.number, own, "" if own is not None else note)
    assert trial is not None
    return Chosen(directory, _known(state, directory, trial))


def _known(state: SweepState, directory: Path, trial: int) -> int:
    if trial not in state.trials:
        raise ValueError(
            f"{directory} has no trial {trial}; it has 0 to {max(state.trials, default=0)}"
        )
    return trial


# ---- what is known of it


def read_model(chosen: Chosen, **loading: Any) -> Model:
    """The chosen encoder; ValueError where its checkpoint is gone or cannot be read.

    `loading` is for `load_for`: the data are needed only where an older journal does not say how
    images were normalised.
    """
    return _of_trial(chosen, loading) if chosen.trial is not None else _of_run(chosen)


def _of_run(chosen: Chosen) -> Model:
    from trainer.export import load_encoder

    encoder = load_encoder(chosen.directory / FILES["safetensors"])
    try:
        plan = json.loads((chosen.directory / RUN_PLAN).read_text(encoding="utf-8"))
        result = json.loads((chosen.directory / RUN_RESULT).read_text(encoding="utf-8"))
        source = {"kind": "run", "name": chosen.directory.name, "trial": None, "confirmed": False}
        source |= {"samples_seen": result["samples_seen"], "state": "completed"}
        data = {"name": encoder.config.dataset, "digest": plan["data_digest"]}
        metrics = {name: value for name, value in result["metrics"].items() if _told(name, value)}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{RUN_PLAN} or {RUN_RESULT} of {chosen.directory} is missing or damaged; let the run "
            f"end by 'contrasweep train --resume {chosen.directory}': {error!r}"
        ) from None
    return Model(encoder, _about(encoder, source, data, metrics, {}, None))


def _of_trial(chosen: Chosen, loading: Mapping[str, Any]) -> Model:
    from trainer.checkpoint import load_checkpoint
    from trainer.pictures import trained_encoder

    assert chosen.trial is not None
    directory = chosen.directory
    state = load_state(directory / FILE_NAME)
    header, trial = state.header, state.trials[chosen.trial]
    journaled = parse_sweep(header["config"])
    config = parse_sweep(read_sweep_yaml(directory / "sweep.yaml"))
    storage = storage_of(config, directory, str(header["config"]["name"]))
    if trial.checkpoint is None:
        raise _without_checkpoint(state, directory, trial)
    try:
        with storage.opened(f"{trial.checkpoint}/{CHECKPOINT_FILE}") as path:
            checkpoint = load_checkpoint(path)
    except FileNotFoundError:
        raise _without_checkpoint(state, directory, trial) from None
    encoder = trained_encoder(checkpoint, _without_images(header["data"], trial, loading))
    source = {
        "kind": "sweep" if journaled.confirmation is None else "confirmation",
        "name": journaled.name,
        "sweep_id": header["sweep_id"],
        "trial": trial.number,
        "state": trial.state or "unfinished",
        "samples_seen": checkpoint.mark,
        "confirmed": chosen.confirmed is not None,
        "objective": journaled.objective,
        "params": trial.params,
    }
    record = None
    if journaled.confirmation is not None:
        source |= {"sweep": journaled.confirmation.sweep, "candidate": trial.params["candidate"]}
        record = to_record(state, journaled.confirmation)
    # What was measured of these weights; a later report is of weights that were not kept.
    report = trial.reports.get(trial.checkpoint_mark)
    metrics = {k: v for k, v in (report["metrics"] if report else {}).items() if _told(k, v)}
    about = _about(
        encoder, source, header["data"], metrics, header["versions"], header.get("git_commit")
    )
    mark, whole = trial.checkpoint_mark, int(header["total_images"])
    if mark < whole:
        about["notes"].append(
            f"these weights are those after {mark:,} of {whole:,} images: trial {trial.number} has "
            "no later checkpoint"
        )
    return Model(encoder, about, record)


def _told(name: str, value: Any) -> bool:
    return name.removeprefix("test_") in TOLD_METRICS and value is not None


def _about(
    encoder: ExportedEncoder,
    source: dict[str, Any],
    data: Mapping[str, Any],
    metrics: dict[str, Any],
    trained_with: Mapping[str, str],
    commit: str | None,
) -> dict[str, Any]:
    from trainer.export import fingerprint

    told = ("name", "train", "val", "test", "classes", "digest")
    return {
        "schema": SCHEMA,
        "model": fingerprint(encoder),
        "source": source,
        "encoder": encoder.config.encoder,
        "feature_dim": encoder.feature_dim,
        "image_size": encoder.config.image_size,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "data": {name: data[name] for name in told if name in data},
        "metrics": metrics,
        "figures": [],
        "notes": [],
        "trained_with": dict(trained_with),
        "trained_commit": commit,
        "exported_with": versions(),
        "exported_commit": git_commit(),
        "config": encoder.config.model_dump(mode="json"),
    }


def _without_checkpoint(state: SweepState, directory: Path, trial: TrialState) -> ValueError:
    kept = [str(each.number) for each in state.trials.values() if each.checkpoint is not None]
    kept = [number for number in kept if number != str(trial.number)]
    there = "no trial has one"
    if kept:
        more = ", ..." if len(kept) > TOLD_TRIALS else ""
        there = f"there are those of trials {', '.join(kept[:TOLD_TRIALS])}{more}"
    return ValueError(
        f"the checkpoint of trial {trial.number} of {directory} was not kept; {there}. "
        f"--keep-checkpoints keeps more in the next sweep; 'contrasweep train --from {directory} "
        f"--trial {trial.number}' trains it again"
    )


def _without_images(
    described: Mapping[str, Any], trial: TrialState, loading: Mapping[str, Any]
) -> DataSplits:
    """Normalisation and class names of the data, from the journal or, of an older one, anew."""
    import numpy as np

    from trainer.config import parse_config
    from trainer.datasets import DataSplits, Split, load_for

    if "mean" not in described:
        config = parse_config(trial.config)
        if config.in_memory == "auto":
            config = config.model_copy(update={"in_memory": held_in_memory(dict(described))})
        data = load_for(
            config,
            labels_needed=False,
            labelled_in_memory=labelled_in_memory(dict(described)),
            **loading,
        )
        if describe_data(data)["digest"] != described["digest"]:
            raise ValueError(
                f"the data set {data.name} has changed since the sweep began, and its journal "
                "does not say how images were normalised; restore it"
            )
        return data
    none = Split(np.empty((0, 3, 1, 1), np.uint8), np.empty(0, np.int64))
    mean, std = tuple(described["mean"]), tuple(described["std"])
    classes = tuple(described["class_names"])
    return DataSplits(str(described["name"]), classes, none, none, none, none, (), mean, std)


# ---- files


def check_formats(formats: Sequence[str]) -> tuple[str, ...]:
    """The formats, each once; ValueError for an unknown one, or one that cannot be had here."""
    found = tuple(dict.fromkeys(part for text in formats for part in text.split(",") if part))
    for name in found:
        if name not in FILES:
            raise ValueError(f"--format must be of {', '.join(FILES)}, got {name!r}")
    if "onnx" in found:
        from trainer.programs import check_packages

        check_packages()
    return found or ("safetensors",)


def check_folder(out: Path, model: str, *, force: bool) -> dict[str, Any]:
    """What an earlier export of this model left in the folder, by format.

    ValueError where the folder holds another model's files, unless with `force`.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    own = [out / name for name in (ABOUT, CARD, *FILES.values())]
    if not any(path.exists() for path in own):
        return {}
    try:
        about = json.loads((out / ABOUT).read_text(encoding="utf-8"))
        there, files = about["model"], dict(about["files"])
    except (OSError, ValueError, KeyError, TypeError):
        there, files = None, {}
    if there == model:
        return {name: each for name, each in files.items() if (out / FILES[name]).is_file()}
    if not force:
        raise ValueError(
            f"{out} holds the export of another model; choose another --out, or replace it by "
            "--force"
        )
    return {}


def write_export(
    model: Model,
    out: Path,
    formats: Sequence[str],
    card: Callable[[dict[str, Any]], str],
    *,
    force: bool = False,
) -> dict[str, Any]:
    """Write the model's files into a folder and give what `model.json` then says.

    Files of the same model in other formats stay; with `force` those of another model go, before
    the first new one comes, so that a kill leaves no file of that one below this one's name.
    """
    from trainer.export import save_exported

    encoder = model.encoder
    there = check_folder(out, model.about["model"], force=force)
    with tempfile.TemporaryDirectory(prefix="contrasweep-") as folder:
        made = Path(folder)
        files: dict[str, Any] = {}
        program = None
        for name in formats:
            path = made / FILES[name]
            difference = 0.0
            if name == "safetensors":
                save_exported(path, encoder)
            else:
                from trainer.programs import save_onnx, save_torch, traced

                program = program or traced(encoder)
                save = save_onnx if name == "onnx" else save_torch
                difference = save(path, program, encoder)
            files[name] = {
                "file": FILES[name],
                "bytes": path.stat().st_size,
                "largest_difference": difference,
            }
        about = {**model.about, "files": {**there, **files}}
        text = json.dumps(about, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (made / ABOUT).write_text(text, encoding="utf-8")
        (made / CARD).write_text(card(about), encoding="utf-8")
        if not there:  # what lies there, if anything, is another model's
            for name in (ABOUT, CARD, *FILES.values()):
                (out / name).unlink(missing_ok=True)
        # What says whose the folder is comes first: after a kill the same command goes on.
        for name in (ABOUT, *(FILES[each] for each in formats), CARD):
            with (made / name).open("rb") as source, replacing(out / name) as target:
                shutil.copyfileobj(source, target, 1 << 20)
    return about

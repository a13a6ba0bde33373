"""The user's losses in sweeps: copied, used from the copy on real workers, refused once changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from search import Sweep, SweepConfig
from search.journal import load_state
from search.train import train, trial_to_repeat
from search.user_files import (
    LossFile,
    check_loss_files,
    copy_loss_files,
    from_json,
    in_copies,
    loss_files,
    to_json,
)
from tests.extent import long
from trainer.datasets import load_dataset, load_for

LOSS = """
def {name}(z0, z1, config):
    '''squared distance'''
    return (z0 - z1).square().mean() * {weight}
"""


def loss_at(path: Path, name: str = "pull", weight: float = 1.0) -> str:
    path.write_text(LOSS.format(name=name, weight=weight))
    return f"{path}:{name}"


def test_each_file_is_kept_once_under_a_name_of_its_own(tmp_path: Path) -> None:
    first, second = loss_at(tmp_path / "a.py"), loss_at(tmp_path / "b.py", weight=2.0)
    files = loss_files(["nt_xent", first, second, first, "trainer.pair_losses:nt_xent"])
    assert [file.copy for file in files] == ["loss.py", "loss-2.py"]
    assert len({file.sha256 for file in files}) == 2
    out = tmp_path / "sweep"
    out.mkdir()
    copy_loss_files(files, out)
    assert (out / "loss-2.py").read_text() == (tmp_path / "b.py").read_text()
    assert in_copies(second, files, out) == f"{out / 'loss-2.py'}:pull"
    assert in_copies("nt_xent", files, out) == "nt_xent"
    assert from_json(json.loads(json.dumps(to_json(files)))) == files


def test_a_change_of_the_file_or_its_copy_is_refused(tmp_path: Path) -> None:
    ref = loss_at(tmp_path / "a.py")
    out = tmp_path / "sweep"
    out.mkdir()
    files = loss_files([ref])
    copy_loss_files(files, out)
    check_loss_files(files, out)
    (tmp_path / "a.py").unlink()
    check_loss_files(files, out)  # the copy is enough
    loss_at(tmp_path / "a.py", weight=3.0)
    with pytest.raises(ValueError, match=r"the loss in .*a.py has changed"):
        check_loss_files(files, out)
    (tmp_path / "a.py").unlink()
    (out / "loss.py").write_text("")
    with pytest.raises(ValueError, match=r"the loss in .*loss.py has changed"):
        check_loss_files(files, out)
    (out / "loss.py").unlink()
    with pytest.raises(ValueError, match="is gone; restore it"):
        check_loss_files([LossFile(**vars(files[0]))], out)


def small(tmp_path: Path, **fields: Any) -> SweepConfig:
    base: dict[str, Any] = {"name": "s", "out": str(tmp_path / "runs"), "trials": 2, "epochs": 1.0}
    base |= {"max_concurrent": 1}  # each worker costs the seconds of its start
    fixed = {"batch_size": 32, "device": "cpu", **fields.pop("fixed", {})}
    return SweepConfig(**(base | {"train_limit": 200, "val_limit": 60} | fields), fixed=fixed)


@long
@pytest.mark.slow
def test_a_sweep_with_own_losses_goes_on_from_its_copies(tmp_path: Path, one_ray: None) -> None:
    refs = [loss_at(tmp_path / "a.py"), loss_at(tmp_path / "b.py", "push", 2.0)]
    space = tmp_path / "my_space.py"
    space.write_text(
        "def space(trial):\n    lr = trial.suggest_float('lr', 1e-4, 1e-2, log=True)\n"
        f"    return {{'lr': lr, 'loss': trial.suggest_categorical('loss', {refs!r})}}\n"
    )
    plan = small(tmp_path, space=f"{space}:space", sampler="random", trials=4, seed=3)
    result = Sweep(plan).run()
    assert result.trials == {"completed": 4}
    state = load_state(result.dir / "events.jsonl")
    assert [entry["copy"] for entry in state.header["loss_files"]] == ["loss.py", "loss-2.py"]
    assert {trial.config["loss"] for trial in state.trials.values()} == set(refs)

    for file in ("a.py", "b.py"):
        (tmp_path / file).unlink()
    assert Sweep.open(result.dir).resume(trials=1).trials == {"completed": 5}
    again = trial_to_repeat(result.dir, 0).run
    report = train(again, load_for(again.loading()), tmp_path / "again")["metrics"]
    assert report["knn_top1"] == state.trials[0].last_report["metrics"]["knn_top1"]  # type: ignore[index]

    (result.dir / "loss-2.py").write_text("")
    with pytest.raises(ValueError, match=r"loss-2.py has changed"):
        Sweep.open(result.dir).resume(trials=1)


def pictures(folder: Path, *, classes: bool) -> str:
    digits = load_dataset("digits").train
    for number, image in enumerate(digits.images[:300]):
        place = folder / str(digits.labels[number]) if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(place / f"{number}.png")
    return f"folder:{folder}"


@long
@pytest.mark.slow
def test_a_streamed_sweep_gives_what_one_in_memory_gives(tmp_path: Path, one_ray: None) -> None:
    dataset = pictures(tmp_path / "pictures", classes=True)
    found = {}
    for mode in ("yes", "no"):
        plan = small(tmp_path, name=mode, dataset=dataset, in_memory=mode, objective="linear_top1")
        sweep = Sweep(plan, cache_dir=tmp_path / "cache")
        assert sweep.run().trials == {"completed": 2}
        state = load_state(sweep.dir / "events.jsonl")
        found[mode] = [
            [report["metrics"][name] for name in ("knn_top1", "linear_top1", "train_loss")]
            for report in sorted(state.reports, key=lambda r: (r["number"], r["mark"]))
        ]
    assert found["yes"] == found["no"]


@long
@pytest.mark.slow
def test_images_without_labels_are_searched_by_their_rank(tmp_path: Path, one_ray: None) -> None:
    flat = tmp_path / "flat"
    pictures(flat, classes=False)
    with pytest.raises(ValueError, match="--labelled"):
        Sweep(small(tmp_path, dataset=f"folder:{flat}"), cache_dir=tmp_path / "cache").run()
    notes: list[str] = []
    plan = small(tmp_path, dataset=f"folder:{flat}", objective="rankme")
    result = Sweep(plan, cache_dir=tmp_path / "cache", on_note=notes.append).run()
    assert result.trials == {"completed": 2}
    assert result.best is not None
    assert result.best["value"] > 1
    assert [note for note in notes if "ranks runs of one method only" in note]
    few = small(tmp_path, name="few", dataset=f"folder:{flat}", labelled="digits")
    assert Sweep(few, cache_dir=tmp_path / "cache").run().trials == {"completed": 2}

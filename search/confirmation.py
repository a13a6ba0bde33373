"""What a confirmation is: some configurations of a sweep, each trained with several fresh seeds.

It is a sweep of its own, in the folder `confirm-N` of the sweep that it confirms: its space is a
list of candidates times a list of seeds, every point of which is tried once and for the full
resource. So it is placed, journaled, resumed and recorded as any sweep is. At the end of each trial
val and test are judged image by image; nothing is decided by the test split.

All candidates share the seeds, so that they are paired by seed and by image.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from optuna.trial import BaseTrial

    from search.config import SweepConfig
    from spaces import Space
    from trainer.datasets import DataSplits

SCHEMA = 1
"""Of `confirmation.json`."""
SPACE = "confirm"
"""What stands for the space in the configuration of a confirmation."""
FOLDER = "confirm-"
MOST_SEEDS, MOST_TRIALS = 100, 2_000
"""What readers of the record take."""
NO_LABELS = (
    "a confirmation is judged on labelled test images, and the data set {} has none; search with "
    "--labelled SOURCE"
)


class Candidate(BaseModel):
    """One configuration: `fields` of `TrainConfig`, and where it comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    trial: int | None = Field(description="of the sweep; none: it was not tried there")
    top: bool = Field(description="whether it is one of the sweep's best")
    baseline: bool = Field(description="whether the others are compared with it")
    searched_value: float | None = Field(description="the objective that the sweep found")
    params: dict[str, Any]
    fields: dict[str, Any]


class Confirmation(BaseModel):
    """Candidates x seeds, and whose they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sweep_id: str = Field(description="of the sweep that is confirmed")
    sweep: str = Field(description="its name")
    ordinal: int = Field(ge=1, description="how often its test split is used, with this time")
    data_digest: str = Field(description="of the data that the sweep searched on")
    searched_images: int | None = Field(None, description="the full resource of the sweep's trials")
    candidates: tuple[Candidate, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=2, max_length=MOST_SEEDS)

    @property
    def trials(self) -> int:
        """How many are trained."""
        return len(self.candidates) * len(self.seeds)


class ConfirmationSpace:
    """A confirmation as a space of two choices."""

    def __init__(self, confirmation: Confirmation) -> None:
        self._seeds = confirmation.seeds
        self._candidates = {each.name: each.fields for each in confirmation.candidates}

    def __call__(self, trial: BaseTrial) -> dict[str, Any]:
        """The fields of a candidate, with one of the seeds."""
        name = trial.suggest_categorical("candidate", list(self._candidates))
        repeat = trial.suggest_int("repeat", 0, len(self._seeds) - 1)
        return {**self._candidates[name], "seed": self._seeds[repeat]}


def space_of(config: SweepConfig) -> Space:
    """The space that a sweep searches; ValueError where there is none of that name."""
    from spaces import load_space

    if config.confirmation is not None:
        return ConfirmationSpace(config.confirmation)
    return load_space(config.space)


def runs_folder(directory: Path, confirmation: object) -> Path:
    """The folder of sweeps that a sweep's is in; a confirmation's lies in its sweep's."""
    return directory.parent if confirmation is None else directory.parent.parent


def title(config: Mapping[str, Any]) -> str:
    """The name under which MLflow has a sweep, from its journaled configuration."""
    confirmation = config.get("confirmation")
    name = str(config["name"])
    return name if confirmation is None else f"{confirmation['sweep']}/{name}"


def check_data(confirmation: Confirmation, digest: str, data: DataSplits) -> None:
    """ValueError if these are not the sweep's data, or have nothing to be judged on."""
    if digest != confirmation.data_digest:
        raise ValueError(
            f"the data set {data.name} has changed since the sweep {confirmation.sweep} began: it "
            f"is now {len(data.train):,} training images; restore it"
        )
    if not len(data.bank) or not len(data.test):
        raise ValueError(NO_LABELS.format(data.name))


def packed(right_N: NDArray[np.bool_]) -> str:
    """Booleans as text, eight to a byte."""
    import numpy as np

    return base64.b64encode(np.packbits(right_N).tobytes()).decode("ascii")

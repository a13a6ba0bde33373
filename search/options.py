"""Options that several verbs of the command line share, with their help and defaults."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from search.config import SweepConfig


def sweep_option(field: str, *names: str, **more: Any) -> Any:
    """An option whose help and default are those of a `SweepConfig` field."""
    info = SweepConfig.model_fields[field]
    default = info.get_default(call_default_factory=True)
    shown = "" if default is None or default == [] else f" (default: {default})"
    return typer.Option(*names, help=f"{info.description}{shown}", show_default=False, **more)


def check_read(given: Collection[str], config: SweepConfig) -> None:
    """ValueError for an option that was `given` and that this sweep would not read."""
    budgets = (config.max_hours, config.max_gpu_hours, config.max_images)
    stops = config.scheduler != "none"
    read = {
        "grid_points": (config.sampler == "grid", "--sampler grid"),
        "on_budget": (any(budgets), "--max-hours, --max-gpu-hours or --max-images"),
        "grace": (stops, "a scheduler that stops trials"),
        "min_competitors": (stops, "a scheduler that stops trials"),
        "reduction": (config.scheduler == "asha", "--scheduler asha"),
    }
    for field, (is_read, owner) in read.items():
        if field in given and not is_read:
            raise ValueError(f"--{field.replace('_', '-')} has no effect without {owner}")


Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Set a field of the trainer; repeatable."),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Of decoded folders. (default: the user's cache folder)", show_default=False),
]
Download = Annotated[bool, typer.Option("--download", help="Fetch the data set if it is missing.")]
DataDir = Annotated[str | None, sweep_option("data_dir", "--data-dir")]
Labelled = Annotated[str | None, sweep_option("labelled", "--labelled")]
InMemory = Annotated[Literal["auto", "yes", "no"] | None, sweep_option("in_memory", "--in-memory")]
TrainLimit = Annotated[int | None, sweep_option("train_limit", "--train-limit")]
ValLimit = Annotated[int | None, sweep_option("val_limit", "--val-limit")]
TestLimit = Annotated[int | None, sweep_option("test_limit", "--test-limit")]
SweepDir = Annotated[Path, typer.Argument(metavar="RUNS/NAME", help="A sweep's folder.")]

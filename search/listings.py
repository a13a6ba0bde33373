"""`contrasweep spaces | datasets | encoders | losses | fields`: what there is, a line each."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from search.console import print_json, print_known, print_space
from search.options import Json

listings = typer.Typer()


@listings.command()
def spaces(
    space: Annotated[str | None, typer.Argument(help="A space, to be shown whole.")] = None,
    as_json: Json = False,
) -> None:
    """The search spaces there are; with a name or FILE.py:FUNCTION, what that one searches."""
    from spaces import SPACES, load_space
    from spaces.describe import describe

    if space is None:
        print_known({name: _first_line(each) for name, each in SPACES.items()}, as_json)
        return
    parameters, samples = describe(load_space(space))
    if as_json:
        print_json({"parameters": [asdict(each) for each in parameters], "samples": samples})
    else:
        print_space(parameters, samples)


@listings.command()
def datasets(as_json: Json = False) -> None:
    """The sources of images there are."""
    from trainer.datasets import SOURCES

    print_known({name: source[0] for name, source in SOURCES.items()}, as_json)


@listings.command()
def encoders(as_json: Json = False) -> None:
    """The encoders there are."""
    from trainer.models import ENCODERS

    known = {name: entry[0] for name, entry in ENCODERS.items()}
    known["torchvision:NAME"] = "a classification model of torchvision, without its last layer"
    print_known(known, as_json)


@listings.command()
def losses(as_json: Json = False) -> None:
    """The losses there are."""
    from trainer.losses import LOSSES

    known = {
        name: f"{loss.description}; fields: {', '.join(loss.own_fields) or 'none'}"
        for name, loss in LOSSES.items()
    }
    known["FILE.py:FUNCTION"] = "your own: function(z0, z1, config) -> scalar, z0 and z1 [B, D]"
    print_known(known, as_json)


@listings.command()
def fields(as_json: Json = False) -> None:
    """The trainer's fields, for --set: default and meaning."""
    from trainer.config import TrainConfig

    print_known(
        {
            name: f"[{'none' if info.default is None else info.default}] {info.description}"
            for name, info in TrainConfig.model_fields.items()
        },
        as_json,
    )


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().partition("\n")[0]

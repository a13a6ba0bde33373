"""`contrasweep spaces | datasets | encoders | losses | fields`: what there is, a line each."""

from __future__ import annotations

import typer

from search.console import print_known
from search.options import Json

listings = typer.Typer()


@listings.command()
def spaces(as_json: Json = False) -> None:
    """The search spaces there are."""
    from spaces import SPACES

    print_known({name: _first_line(space) for name, space in SPACES.items()}, as_json)


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

"""What the README says is true: its commands parse, its space works, its tree is the tree."""

import re
import shlex
import shutil
import textwrap
from pathlib import Path
from typing import Any

import click
import optuna
import pytest
import typer
from PIL import Image

from search.cli import app
from search.train import Run, train
from spaces import load_space, run_space
from trainer.config import TrainConfig, parse_config
from trainer.datasets import load_for
from trainer.losses import get_loss

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every `contrasweep ...` line of the README's code blocks, continued lines joined."""
    blocks = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
    shell = "\n".join(block for language, block in blocks if not language)
    lines = shell.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("contrasweep ")]


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 12


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_readme_parses(line: str) -> None:
    verb, *arguments = shlex.split(line, comments=True)[1:]
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    command = group.commands[verb]  # type: ignore[union-attr]
    if "--help" not in arguments:
        command.make_context(verb, arguments)


def test_the_space_of_the_readme_gives_configurations(tmp_path: Path) -> None:
    source = re.search(r"```python\n\s*(# my_space.py.*?)```", README, flags=re.DOTALL)
    assert source is not None
    text = "\n".join(line.removeprefix("  ") for line in source[1].splitlines())
    (tmp_path / "my_space.py").write_text(text)
    space = load_space(f"{tmp_path / 'my_space.py'}:warm")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(50):
        parse_config(run_space(space, study.ask()))


def test_the_loss_of_the_readme_is_one(tmp_path: Path) -> None:
    source = re.search(r"```python\n\s*(# my_loss.py.*?)```", README, flags=re.DOTALL)
    assert source is not None
    (tmp_path / "my_loss.py").write_text(textwrap.dedent("  " + source[1]))
    assert get_loss(f"{tmp_path / 'my_loss.py'}:mine").description.startswith("squared distance")


@pytest.mark.slow
def test_the_exported_encoder_is_used_as_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_pixels = re.search(r"```python\n(from trainer import load_.*?)```", README, flags=re.DOTALL)
    of_files = re.search(r"```python\n(import torch\n.*?)```", README, flags=re.DOTALL)
    assert of_pixels is not None
    assert of_files is not None
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(epochs=1, train_limit=300, batch_size=64)
    data = load_for(config)
    train(Run(config), data, Path("runs/barlow"))
    scope: dict[str, Any] = {"images": data.test.images[:5]}
    exec(of_pixels[1], scope)
    assert scope["features"].shape == (5, 192)
    shutil.copytree("runs/barlow", "runs/cifar/export")
    for name in ("cat.jpg", "dog.png"):
        Image.fromarray(data.test.images[0].transpose(1, 2, 0)).save(name)
    exec(of_files[1], scope)
    assert scope["features"].shape == (2, 192)


def test_the_tree_names_every_file() -> None:
    tree = README.split("## The tree")[1]
    for room in ("trainer", "spaces", "search", "analysis"):
        for path in (ROOT / room).iterdir():
            if path.suffix in (".py", ".j2") and path.name != "__init__.py":
                assert path.name in tree, path


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = re.search(r"```python\n(from search.*?)```", README, flags=re.DOTALL)
    assert source is not None
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    code = (
        source[1]
        .replace("trials=8, epochs=6", "trials=2, epochs=1")
        .replace("epochs=5", "epochs=1")
    )
    exec(code, scope)
    assert len(scope["frames"].trials) == 2  # type: ignore[attr-defined]

    notebook = re.search(r"```python\n(import plotly.*?)```", README, flags=re.DOTALL)
    assert notebook is not None
    exec(notebook[1].replace('"cifar"', f'"{scope["result"].name}"'), scope)  # type: ignore[attr-defined]
    assert "samples_seen" in Path("train_loss.html").read_text("utf-8")

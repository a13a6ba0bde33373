"""`cluster.yaml` and what the README says of clusters: Ray takes both files, each command parses.

Left out: real machines. The commands that need none of the network are run as they stand.
"""

import copy
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from search.cli import app

ROOT = Path(__file__).parent.parent
SECTION = (
    (ROOT / "README.md").read_text(encoding="utf-8").split("\n## On a cluster\n")[1].split("\n## ")
)[0]
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", SECTION, flags=re.DOTALL)
TEXTS = {
    "cluster.yaml": (ROOT / "cluster.yaml").read_text(encoding="utf-8"),
    "own.yaml": next(block for language, block in BLOCKS if language == "yaml"),
}
FILES: dict[str, dict[str, Any]] = {name: yaml.safe_load(text) for name, text in TEXTS.items()}
FILE_NAMES = pytest.mark.parametrize("name", FILES)


def prepared(name: str) -> dict[str, Any]:
    """The file with Ray's defaults filled in, as the launcher uses it."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(copy.deepcopy(FILES[name]))


def started(commands: list[str]) -> str:
    """The one of the commands that starts Ray."""
    (command,) = (each for each in commands if "ray start" in each)
    return command


def bash(command: str, home: Path) -> str:
    """What a command prints, run with `home` as the user's home folder."""
    done = subprocess.run(
        ["bash", "-c", command],
        env={"HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin"},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


@FILE_NAMES
def test_ray_accepts_the_file(name: str) -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(prepared(name))


@FILE_NAMES
def test_all_nodes_are_set_up_the_same_way(name: str) -> None:
    config = prepared(name)
    commands = config["head_setup_commands"]
    assert commands == config["worker_setup_commands"] == FILES[name]["setup_commands"]
    kinds = config["available_node_types"].values()
    assert not any("worker_setup_commands" in kind for kind in kinds)
    (install,) = (each for each in commands if "pip install" in each)
    assert "-c ~/contrasweep-node/source/constraints.txt" in install
    assert "-e ~/contrasweep-node/source " in install
    assert "'ray[default]'" in install  # the dashboard and its jobs


def test_the_two_files_differ_in_little() -> None:
    ours, own = (FILES[name]["setup_commands"] for name in ("cluster.yaml", "own.yaml"))
    assert len(ours) == len(own)
    assert [a == b for a, b in zip(ours, own, strict=True)].count(False) == 3  # apt, boto3, storage
    assert FILES["cluster.yaml"]["file_mounts"] == FILES["own.yaml"]["file_mounts"]


def test_the_gpu_nodes_are_spot_instances_that_come_when_needed() -> None:
    config = FILES["cluster.yaml"]
    gpu = config["available_node_types"]["gpu"]
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gpu["min_workers"] == 0
    assert 0 < gpu["max_workers"] == config["max_workers"]
    assert gpu["resources"] == {"CPU": 8, "GPU": 1}
    assert 0 < config["idle_timeout_minutes"] <= 30
    assert config["provider"]["cache_stopped_nodes"] is False


def test_the_head_is_on_demand_and_trains_nothing() -> None:
    config = FILES["cluster.yaml"]
    head = config["available_node_types"][config["head_node_type"]]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"] == {"CPU": 0}
    assert "--num-cpus=0" in started(config["head_start_ray_commands"])
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in started(
        config["head_start_ray_commands"]
    )


def test_all_nodes_have_one_image_that_the_user_chooses() -> None:
    kinds = FILES["cluster.yaml"]["available_node_types"].values()
    assert {kind["node_config"]["ImageId"] for kind in kinds} == {"ami-FILL-IN"}
    assert not re.search(r"ami-[0-9a-f]{8}", TEXTS["cluster.yaml"])


@FILE_NAMES
def test_the_token_is_asked_for_and_the_dashboard_stays_on_loopback(name: str) -> None:
    config = prepared(name)
    head, worker = (started(config[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    assert "RAY_AUTH_MODE=token" in head
    assert "RAY_AUTH_MODE=token" in worker  # Ray turns it on by itself for a head only
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in head + worker


@FILE_NAMES
def test_the_file_holds_no_credentials_and_no_host(name: str) -> None:
    text = TEXTS[name]
    assert not re.search(r"AKIA|aws_credentials|secret|PRIVATE KEY|password", text, re.IGNORECASE)
    assert not re.search(r"index-url|find-links|git@", text)
    urls = re.findall(r"\w+://[^\s'\"]*", text)
    assert all(url.startswith(("s3://BUCKET/", "gs://BUCKET/")) for url in urls), urls


@FILE_NAMES
def test_the_commands_are_bash(name: str, tmp_path: Path) -> None:
    kinds = ("setup", "head_start_ray", "worker_start_ray")
    commands = [each for kind in kinds for each in FILES[name][f"{kind}_commands"]]
    bash("\n".join(f"bash -n -c {shlex.quote(each)} &&" for each in commands) + " true", tmp_path)


@FILE_NAMES
def test_every_shell_of_a_node_finds_the_program_and_the_storage(name: str, tmp_path: Path) -> None:
    (tmp_path / "contrasweep-node").mkdir()
    commands = [each for each in FILES[name]["setup_commands"] if "env.sh" in each]
    assert len(commands) == 2
    for _ in range(2):  # as `ray up` does anew after each change
        for command in commands:
            bash(command, tmp_path)
    assert (tmp_path / ".bashrc").read_text() == ". ~/contrasweep-node/env.sh\n"
    found = bash('. ~/.bashrc; echo "$PATH $RAY_AUTH_MODE $SWEEPS"', tmp_path).split()
    assert found[0].startswith(f"{tmp_path}/contrasweep-node/venv/bin:")
    storage = {"cluster.yaml": "s3://BUCKET/sweeps", "own.yaml": "/mnt/nfs/sweeps"}
    assert found[1:] == ["token", storage[name]]


def test_the_bundle_gives_a_node_one_commit(tmp_path: Path) -> None:
    mounted = FILES["cluster.yaml"]["file_mounts"]
    (target,) = (there for there, here in mounted.items() if here == "dist/contrasweep.bundle")
    assert any("git bundle create dist/contrasweep.bundle HEAD" in block for _, block in BLOCKS)
    bundle = tmp_path / target.removeprefix("~/")
    bundle.parent.mkdir()
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        pytest.skip(f"not a git checkout: {head.stderr.strip()}")
    subprocess.run([*git, "bundle", "create", "--quiet", str(bundle), "HEAD"], check=True)
    (clone,) = (each for each in FILES["cluster.yaml"]["setup_commands"] if "git clone" in each)
    bash(clone, tmp_path)
    source = tmp_path / "contrasweep-node" / "source"
    assert (source / "constraints.txt").exists()
    assert bash(f"git -C {source} rev-parse HEAD", tmp_path) == head.stdout


# ---- the README's commands


def calls(program: str) -> list[list[str]]:
    """What follows the program's name wherever the section's shell blocks and files call it.

    In a quoted command too, as in `ray exec FILE 'ray status'`.
    """
    shell = "\n".join(block for language, block in BLOCKS if not language)
    lines = shell.replace("\\\n", " ").splitlines()
    for file in FILES.values():
        for command in file["head_start_ray_commands"] + file["worker_start_ray_commands"]:
            lines += command.split(";")
    commands = [shlex.split(line, comments=True) for line in lines]
    commands += [word.split() for words in commands for word in words if " " in word]
    commands = [[word.strip("()") for word in words] for words in commands]
    return [words[words.index(program) + 1 :] for words in commands if program in words]


def subcommand(group: Any, arguments: list[str]) -> None:
    """Have a group's command parse the arguments; a UsageError says what it does not know."""
    verb, *rest = arguments
    command = group.commands[verb]
    if hasattr(command, "commands"):
        subcommand(command, rest)
    else:
        before = next((k for k, word in enumerate(rest) if word in (">", "&&")), len(rest))
        command.make_context(verb, rest[:before])


def test_the_commands_of_contrasweep_parse() -> None:
    found = calls("contrasweep")
    assert {words[0] for words in found} == {"sweep", "status", "stop", "resume"}
    assert len(found) >= 7
    for words in found:
        subcommand(typer.main.get_command(app), words)
    storages = [words[words.index("--storage") + 1] for words in found if "--storage" in words]
    assert {"$SWEEPS", "s3://BUCKET/sweeps", "/mnt/nfs/sweeps"} == set(storages)


def test_the_options_that_the_section_names_exist() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    known = {
        option
        for command in group.commands.values()  # type: ignore[union-attr]
        for parameter in command.params
        for option in parameter.opts
    }
    named = re.findall(r"`(--[a-z-]+)", SECTION)
    assert {"--storage", "--node-cache", "--gpus-per-trial"} <= set(named)
    assert set(named) <= known


def test_the_commands_of_ray_parse() -> None:
    from ray.scripts.scripts import cli

    found = calls("ray")
    verbs = {"up", "down", "attach", "exec", "dashboard", "job", "start", "stop", "get-auth-token"}
    assert {words[0] for words in found} == verbs | {"status"}
    for words in found:
        subcommand(cli, words)

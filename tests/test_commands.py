"""The command file as its writers and its reader meet it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.commands import FILE_NAME, MALFORMED, CommandFile, append_command

ROOT = Path(__file__).parent.parent
STOP = {"command": "stop", "trial": 3}
ENQUEUE = {"command": "enqueue", "params": {"lr": 0.1, "loss": "nt_xent", "ema_decay": None}}
NO_COMMANDS: dict[str, bytes] = {
    "not JSON": b"stop",
    "not UTF-8": b'{"command": "st\xffop"}',
    "not an object": b'["stop"]',
    "unknown": b'{"command": "start"}',
    "without a command": b'{"trial": 3}',
    "a field too many": b'{"command": "stop", "trials": 3}',
    "a trial that is no number": b'{"command": "stop", "trial": "3"}',
    "a trial that is true": b'{"command": "stop", "trial": true}',
    "a negative trial": b'{"command": "stop", "trial": -1}',
    "without params": b'{"command": "enqueue"}',
    "empty params": b'{"command": "enqueue", "params": {}}',
    "params that are a list": b'{"command": "enqueue", "params": [1]}',
    "not a number": b'{"command": "enqueue", "params": {"lr": NaN}}',
    "a number of 5,000 digits": b'{"command": "stop", "trial": ' + b"9" * 5000 + b"}",
    "too deep": b'{"command": ' + b"[" * 100_000,
}


def without_time(commands: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in c.items() if key != "time"} for c in commands]


def test_commands_come_back_in_order_and_once(tmp_path: Path) -> None:
    commands = CommandFile(tmp_path)
    assert commands.after(0) == []
    append_command(tmp_path, STOP, clock=lambda: 12.5)
    assert commands.after(0) == [{**STOP, "time": 12.5}]
    append_command(tmp_path, ENQUEUE)
    assert without_time(commands.after(1)) == [ENQUEUE]
    assert commands.after(2) == []
    assert without_time(CommandFile(tmp_path).after(0)) == [STOP, ENQUEUE]


@pytest.mark.parametrize("name", NO_COMMANDS)
def test_a_line_that_is_no_command_is_counted_and_told(name: str, tmp_path: Path) -> None:
    append_command(tmp_path, STOP)
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(NO_COMMANDS[name] + b"\n")
    append_command(tmp_path, ENQUEUE)
    stop, malformed, enqueue = CommandFile(tmp_path).after(0)
    assert without_time([stop, enqueue]) == [STOP, ENQUEUE]
    assert malformed["command"] == MALFORMED
    assert malformed["line"] == 2
    assert 0 < len(malformed["reason"]) <= 200
    assert "\n" not in malformed["reason"]


@pytest.mark.parametrize(
    "command",
    [{}, {"command": "start"}, {"command": "stop", "trial": 1.5}, {"command": "enqueue"},
     {"command": "enqueue", "params": {"lr": float("nan")}}],
)  # fmt: skip
def test_what_is_no_command_is_not_written(command: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"command|params|trial|JSON"):
        append_command(tmp_path, command)
    assert list(tmp_path.iterdir()) == []


def test_a_torn_line_is_no_command_and_swallows_none(tmp_path: Path) -> None:
    commands = CommandFile(tmp_path)
    append_command(tmp_path, STOP)
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(b'{"command": "st')
    assert without_time(commands.after(0)) == [STOP]
    append_command(tmp_path, ENQUEUE)
    assert [c["command"] for c in commands.after(0)] == ["stop", MALFORMED, "enqueue"]


@given(data=st.data())
def test_however_the_bytes_arrive_the_commands_are_the_same(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("s")
    kinds = st.sampled_from([json.dumps(STOP).encode(), json.dumps(ENQUEUE).encode(), b"x", b""])
    content = b"".join(line + b"\n" for line in data.draw(st.lists(kinds, max_size=6)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=8)))
    (folder / FILE_NAME).touch()
    reader, taken = CommandFile(folder), []
    for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
        with (folder / FILE_NAME).open("ab") as file:
            file.write(content[start:end])
        taken += reader.after(len(taken))
    assert taken == CommandFile(folder).after(0)
    assert len(taken) == sum(bool(line) for line in content.split(b"\n"))


def test_nothing_new_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = CommandFile(tmp_path)
    append_command(tmp_path, STOP)
    assert len(commands.after(0)) == 1

    def opened(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the file was opened")

    monkeypatch.setattr(Path, "open", opened)
    assert len(commands.after(0)) == 1


def test_a_file_that_cannot_be_read_ends_no_sweep(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    (tmp_path / FILE_NAME / "something").touch()
    assert CommandFile(tmp_path).after(0) == []


def test_commands_of_many_writers_at_once_are_all_whole(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from search.commands import append_command\n"
        "for trial in range(100):\n"
        "    params = {'number': int(sys.argv[2]), 'x': 'x' * 200}\n"
        "    append_command(Path(sys.argv[1]), {'command': 'enqueue', 'params': params})\n"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(number)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for number in range(3)
    ]
    reader, taken = CommandFile(tmp_path), []
    while any(writer.poll() is None for writer in writers):
        taken += reader.after(len(taken))
    taken += reader.after(len(taken))
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert {command["command"] for command in taken} == {"enqueue"}
    written = [command["params"]["number"] for command in taken]
    assert [written.count(number) for number in range(3)] == [100, 100, 100]

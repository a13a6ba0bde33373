"""Code of the user's own, named as `FILE.py:FUNCTION` or `MODULE:FUNCTION`: found and imported.

Nothing is imported but what the user names. Left out: what the function is for, which its caller
tries out.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import traceback
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any


def find_function(ref: str, what: str, gives: str) -> tuple[Callable[..., Any], str | None]:
    """Import the function that `ref` names -> it, and the file that it stands in, if there is one.

    A file is imported by its path, under a name of its own and without a change of `sys.path`.
    `what` the function is and what it `gives` are words for messages. ValueError in one line: no
    such file, module or function, a file that fails to import, something that cannot be called.
    """
    place, _, name = ref.rpartition(":")
    if not place or not name:
        raise ValueError(f"{what} {ref!r} must be FILE.py:FUNCTION or MODULE:FUNCTION")
    path = user_file(ref)
    module = _import_module(place, what) if path is None else _import_file(path, what)
    if not hasattr(module, name):
        raise ValueError(f"{what} {ref!r}: {place} has no function {name!r}")
    found: Any = getattr(module, name)
    if not callable(found):
        kind = type(found).__name__
        raise ValueError(f"{what} {ref!r} is of type {kind}, not a function {gives}")
    return found, getattr(module, "__file__", None)


def user_file(ref: str) -> Path | None:
    """Absolute path of the file that `FILE.py:FUNCTION` names; none for any other reference."""
    place, _, _ = ref.rpartition(":")
    return Path(place).expanduser().resolve() if place.endswith(".py") else None


def raised(error: BaseException, file: str | None) -> str:
    """Kind, message and place of an exception in one line: its innermost line, in `file` if so."""
    message = " ".join(str(error).split())
    if isinstance(error, SyntaxError):  # its message names the line
        return f"{type(error).__name__}: {message}"
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if f.filename == file), frames[-1])
    kind = f"{type(error).__name__}: {message}".removesuffix(": ")
    return f"{kind} ({frame.filename}, line {frame.lineno})"


def _import_file(path: Path, what: str) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"{what} file {str(path)!r} does not exist")
    # Named by path and contents: two files of one name do not clash, an edited file is read anew.
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {what} file {str(path)!r}: {error.strerror}") from None
    name = f"contrasweep_{what}_{hashlib.sha256(bytes(path) + source).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    assert spec is not None  # the name ends with .py
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # it is the user's code: anything may be raised
        del sys.modules[name]
        raise ValueError(
            f"{what} file {str(path)!r} fails to import: {raised(error, str(path))}"
        ) from error
    return module


def _import_module(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        why = raised(error, None)
        raise ValueError(f"{what} module {name!r} fails to import: {why}") from error

"""How much the tests try: CONTRASWEEP_TESTS=all asks for all repetitions and for the long tests.

By default statistical tests repeat less, with a tolerance as much wider, and long tests are left
out, most of them sweeps on Ray for one thing each, so that `make test` takes about half the time;
`make test-all` tries all.
"""

from __future__ import annotations

import os

import pytest

ALL = os.environ.get("CONTRASWEEP_TESTS") == "all"
long = pytest.mark.skipif(not ALL, reason="long: make test-all")


def times(by_default: int, in_all: int) -> int:
    """Repetitions of a test."""
    return in_all if ALL else by_default

"""What a sweep may spend: hours of its driver, hours of GPUs, images; and what it has spent."""

from __future__ import annotations

from collections.abc import Iterable

from search.config import SweepConfig
from search.state import SweepState


def spent_budget(
    config: SweepConfig, state: SweepState, in_flight: Iterable[int], now: float
) -> str | None:
    """Which budget is spent at the time `now` (seconds since the epoch), in one line."""
    wall_h = (state.wall_before_s + now - state.session_started) / 3600
    if config.max_hours is not None and wall_h >= config.max_hours:
        return f"the budget of {config.max_hours:g} hours is spent"
    if config.max_images is not None and state.samples_seen >= config.max_images:
        return f"the budget of {config.max_images:,} images is spent"
    if config.max_gpu_hours is not None:
        used = gpu_hours(state, in_flight, now)
        if used >= config.max_gpu_hours:
            return f"the budget of {config.max_gpu_hours:g} GPU hours is spent"
    return None


def gpu_hours(state: SweepState, in_flight: Iterable[int], now: float) -> float:
    """Hours that trials held their GPUs, those in flight up to `now`, times the GPUs of each."""
    gpu_s = state.gpu_s
    for number in in_flight:
        since = state.trials[number].running_since
        gpu_s += max(0.0, now - since) * state.gpus_per_trial if since is not None else 0.0
    return gpu_s / 3600

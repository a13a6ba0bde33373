"""What a person sees of one run: a bar on a terminal, a line for each report everywhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from search.train import Progress
from trainer.loop import Report


class TrainDisplay(Progress):
    """Shows one run: a bar on a terminal, and a line for each report everywhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = ProgressBar(
            TextColumn("{task.fields[text]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=None, text="")

    def __enter__(self) -> TrainDisplay:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def on_start(self, total_images: int) -> None:
        """Set the length of the bar."""
        self._bar.update(self._task, total=total_images)

    def on_step(self, samples_seen: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=samples_seen)

    def on_report(self, report: Report) -> None:
        """Print a report's line."""
        names = ("top1", "knn_top1", "linear_top1")
        accuracies = {name: getattr(report, name) for name in names}
        shown = [f"{name} {value:.4f}" for name, value in accuracies.items() if value is not None]
        line = (
            f"{report.samples_seen:>9,} images  epoch {report.epoch:5.1f}  "
            f"loss {report.train_loss:.3f}  {'  '.join(shown) or f'rankme {report.rankme:.1f}'}  "
            f"{report.images_per_s:,.0f}/s"
        )
        self._console.print(line, soft_wrap=True)
        self._bar.update(self._task, text=shown[0] if shown else "")

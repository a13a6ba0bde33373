"""Which checkpoints stay on the disk: the last of each unfinished trial, the best final ones."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable

from search.asha import score_of
from search.journal import Journal
from search.state import TrialState


class Retention:
    """Drops the checkpoints that nobody will go on from: `delete` removes one by its path.

    Kept are those of unfinished trials and of the `keep` best completed ones. A checkpoint is
    deleted before the journal says so: after a kill in between, `restore` deletes it once more.
    """

    def __init__(
        self,
        keep: int = 10,
        objective: str = "knn_top1",
        mode: str = "max",
        delete: Callable[[str], None] = lambda path: None,
    ) -> None:
        self.delete = delete
        self._keep, self._objective, self._mode = keep, objective, mode
        self._best: list[tuple[float, int]] = []

    def restore(self, journal: Journal) -> None:
        """Take in all trials that have ended, and drop what had not been dropped yet."""
        self._best.clear()  # of those that were ended by the resume itself
        for trial in journal.state.trials.values():
            if trial.state is not None and trial.checkpoint is not None:
                self.ended(trial, journal)

    def ended(self, trial: TrialState, journal: Journal) -> None:
        """A trial came to its final state."""
        if trial.checkpoint is None:
            return
        if trial.state != "completed":
            self._drop(trial, journal)
            return
        score = score_of(trial.value(self._objective), self._mode)
        insort(self._best, (-score, trial.number))
        for _, worse in self._best[self._keep :]:
            self._drop(journal.state.trials[worse], journal)
        del self._best[self._keep :]

    def _drop(self, trial: TrialState, journal: Journal) -> None:
        assert trial.checkpoint is not None
        self.delete(trial.checkpoint)
        journal.append("checkpoint_dropped", number=trial.number)

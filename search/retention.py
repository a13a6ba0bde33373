"""Which checkpoints stay on the disk: the last of each unfinished trial, the best final ones."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence

from search.asha import score_of
from search.journal import Journal
from search.state import TrialState


class Retention:
    """Drops the checkpoints that nobody will go on from: `delete` removes one by its path.

    Kept are those of unfinished trials, of the `keep` best completed ones by the first objective
    and, with several, of all that no other trial beats in all of them. A checkpoint is
    deleted before the journal says so: after a kill in between, `restore` deletes it once more.
    """

    def __init__(
        self,
        keep: int = 10,
        objectives: Sequence[str] = ("knn_top1",),
        modes: Sequence[str] = ("max",),
        delete: Callable[[str], None] = lambda path: None,
    ) -> None:
        self.delete = delete
        self._keep, self._objectives, self._modes = keep, tuple(objectives), tuple(modes)
        self._best: list[tuple[float, int]] = []

    def restore(self, journal: Journal) -> None:
        """Take in the trials that had ended, and drop what had not been dropped yet."""
        self._best.clear()
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
        score = score_of(trial.value(self._objectives[0]), self._modes[0])
        insort(self._best, (-score, trial.number))
        spared = self._best[: self._keep]
        if len(self._objectives) > 1:
            front = {each.number for each in journal.state.pareto(self._objectives, self._modes)}
            spared += [each for each in self._best[self._keep :] if each[1] in front]
        for each in self._best:
            if each not in spared:
                self._drop(journal.state.trials[each[1]], journal)
        self._best = spared

    def _drop(self, trial: TrialState, journal: Journal) -> None:
        assert trial.checkpoint is not None
        self.delete(trial.checkpoint)
        journal.append("checkpoint_dropped", number=trial.number)

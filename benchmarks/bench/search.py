"""The search: quasi-random points by Optuna, kept in a journal, so that a search that was stopped goes on."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .spaces import Contestant

JOURNAL = "optuna.journal"
DIMENSIONS = 4  # all contestants search the same points of this cube, whatever part of them they use


class Search:
    """The studies of one folder of results."""

    def __init__(self, out: Path) -> None:
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend, JournalStorage
        except ImportError as error:
            raise InputError(f"the search needs optuna ({error}): pip install 'grng[bench]'") from error

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna = optuna
        uniform = optuna.distributions.FloatDistribution(0.0, 1.0)
        self.cube: dict[str, Any] = {f"u{i}": uniform for i in range(DIMENSIONS)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.storage = JournalStorage(JournalFileBackend(str(out / JOURNAL)))

    def study(self, workload: str, contestant: Contestant, number: int, goal: str) -> Any:
        """The study of that number: a sequence of points of its own, the same one for every contestant and workload."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)
            sampler = self.optuna.samplers.QMCSampler(
                qmc_type="sobol", scramble=True, seed=number, warn_independent_sampling=False
            )
        # Told the space beforehand: Optuna would learn it from the first point, which would be drawn independently.
        sampler.infer_relative_search_space = lambda study, trial: self.cube  # type: ignore[method-assign]
        return self.optuna.create_study(
            study_name=f"{workload} | {contestant.name} | study {number}",
            storage=self.storage,
            sampler=sampler,
            direction="maximize" if goal == "max" else "minimize",
            load_if_exists=True,
        )

    def point(self, study: Any, contestant: Contestant, number: int) -> tuple[Any, dict[str, float]]:
        """The trial of that number, asked for unless it is there, and its values by the names of the dimensions.

        Trials are asked for in order; one that was killed while it ran is taken up again.
        """
        known = study.get_trials(deepcopy=False)
        while len(known) <= number:
            study.ask(self.cube)
            known = study.get_trials(deepcopy=False)
        trial = known[number]
        values = {d.name: d.at(trial.params[f"u{i}"]) for i, d in enumerate(contestant.space)}
        return trial, values

    def tell(self, study: Any, trial: Any, value: float | None, notes: Mapping[str, Any]) -> None:
        """Record what came of a trial; once."""
        if trial.state.is_finished():
            return
        for name, note in notes.items():
            self.storage.set_trial_user_attr(trial._trial_id, name, note)
        if value is None:
            study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial.number, value)

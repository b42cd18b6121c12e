"""Which steps measure the curvature, and which decompose it."""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from grng.curvature import Curvature, Layer, Statistics
from grng.curvature.visits import Visits

if TYPE_CHECKING:
    from grng.preconditioners import Preconditioner

STEPS, PERIOD, DECOMPOSED = "grng_steps", "grng_period", "grng_decomposed"  # their names in a checkpoint
STEP_OVERHEAD = 1e8  # operations that the fixed costs of a step stand for


class Schedule:
    """Statistics at the first `burn_in` steps, at every T-th, and where a layer that was away is expected back;
    decompositions at steps 0, 1, 2, 4, 8, ..., when the averages change most, then at the first step with statistics
    in every period.

    Args:
        layers: of the model.
        curvature: with burn_in, stats_every (T) and inverse_every.
        preconditioner: may want statistics at every step, and says what a decomposition costs.

    Attributes:
        t: steps made.
        period: steps between decompositions, once it is known.
        work: operations of the layers' forward and backward passes, as the first step shows them.
    """

    def __init__(self, layers: Sequence[Layer], curvature: Curvature, preconditioner: "Preconditioner") -> None:
        self._curvature, self._preconditioner = curvature, preconditioner
        self._visits = Visits(layers, curvature.stats_every)
        self.t, self.period, self.work = 0, 0, 0.0
        self._decomposed = -1  # the last period in which a step did

    def observe(self, layer: Layer, statistics: Statistics) -> None:
        """Count the work, until it has served."""
        if not self.period:
            self.work += 6.0 * statistics.positions * layer.blocks * layer.n_out * layer.n_in

    def measures(self) -> bool:
        """Whether the coming step does."""
        if self._preconditioner.every_step or self.t < self._curvature.burn_in:
            return True
        return self.t % self._curvature.stats_every == 0 or self._visits.expected(self.t)

    def decomposes(self) -> bool:
        """Whether this step does, if it measures."""
        t = self.t
        if not self.period:
            self.period = self._curvature.inverse_every or self._chosen_period()
        before, self._decomposed = self._decomposed, t // self.period
        return (t & (t - 1) == 0) if t < self._curvature.burn_in else before != self._decomposed

    def _chosen_period(self) -> int:
        """Steps between decompositions: such that they take about a quarter as long as the gradients meanwhile, by
        counts of operations, and within one to ten times `stats_every`."""
        stats = self._curvature.stats_every
        steps = 4 * self._preconditioner.decomposition_cost() / (STEP_OVERHEAD + self.work)
        return stats * min(10, max(1, math.ceil(steps / stats)))

    def note(self, gradients: Collection[nn.Parameter], measured: Iterable[Layer] | None) -> None:
        """Who took part in this step, and who was measured; None where nobody was to be."""
        self._visits.note(self.t, gradients, measured)

    def state(self) -> dict[str, Tensor]:
        own = {STEPS: self.t, PERIOD: self.period, DECOMPOSED: self._decomposed}
        return {name: torch.tensor(value) for name, value in own.items()} | self._visits.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Checkpoints of before know no periods; one that was given holds."""
        self.t = int(state[STEPS])
        self.period = self._curvature.inverse_every or int(state.get(PERIOD, self._curvature.stats_every))
        self._decomposed = int(state.get(DECOMPOSED, (self.t - 1) // max(self.period, 1)))
        self._visits.load_state(state)

"""Which steps measure layers that do not take part in every step: heads that take turns, experts, phases."""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from grng.curvature.layers import Layer

STATE = "grng_visits"  # its name in a checkpoint
NEVER = -1
LONGEST = 16  # times T, that a layer is left alone for after it was not found


class Visits:
    """Appointments with layers that the regular steps with statistics have missed.

    Every T steps all layers that take part are measured. One that was away then and has a gradient later is measured
    when it is expected next, as many steps on as lay between its last two gradients; and one that was never measured,
    at the first step it comes again. One that is not found, or of which nothing is measured, is looked for after one,
    two, four, ... steps: an expert that nothing is sent to, a head that is no longer used. While all layers take part
    in all steps, this does nothing.

    Args:
        layers: of the model.
        every: T.

    >>> a, b = (type("Layer", (), {"active": True, "parameters": [name]})() for name in "ab")
    >>> visits, due = Visits([a, b], every=10), []
    >>> for t in range(40):  # even steps are a's, odd ones b's
    ...     measured = t % 10 == 0 or visits.expected(t)
    ...     due += [t] * measured
    ...     visits.note(t, {"ab"[t % 2]}, {(a, b)[t % 2]} if measured else None)
    >>> due
    [0, 2, 3, 10, 13, 20, 23, 30, 33]
    """

    def __init__(self, layers: Sequence[Layer], every: int) -> None:
        self._layers, self._every = layers, every
        self._met: set[Layer] = set()  # measured at some time
        self._away: set[Layer] = set()  # not since the last regular step
        self._last: dict[Layer, int] = {}  # step of the last gradient, of layers that were away at some time
        self._appointed: dict[Layer, int] = {}
        self._wait: dict[Layer, int] = {}  # steps, of layers that were looked for in vain

    def expected(self, t: int) -> bool:
        """Whether a layer is to be measured at step t, regular or not."""
        return t in self._appointed.values()

    def note(self, t: int, gradients: Collection[nn.Parameter], measured: Iterable[Layer] | None) -> None:
        """Step t ends.

        Args:
            gradients: the parameters that had one.
            measured: the layers that were measured, None where none was to be.
        """
        found = None if measured is None else set(measured)
        if found is not None:
            self._met |= found
            if t % self._every == 0:
                self._away = {layer for layer in self._layers if layer.active}
            self._away -= found
            for layer in self._away:
                self._last.setdefault(layer, NEVER)
        if not self._last:
            return
        for layer, before in self._last.items():
            used = any(p in gradients for p in layer.parameters)
            if layer not in self._away:
                self._wait.pop(layer, None)
            elif found is not None and (used or (layer in self._met and self._appointed.get(layer) == t)):
                self._wait[layer] = min(2 * self._wait.get(layer, 0) or 1, LONGEST * self._every)
            wait = self._wait.get(layer, 1)
            if used:
                self._last[layer] = t
                self._appointed[layer] = t + max(wait, 1 if before == NEVER else t - before)
            elif layer not in self._met and before != NEVER and self._appointed.get(layer, t) <= t:
                self._appointed[layer] = t + wait
        self._appointed = {layer: s for layer, s in self._appointed.items() if layer in self._away and s > t}

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, (layers, 5)."""
        rows = [
            (
                layer in self._met,
                layer in self._away,
                self._last.get(layer, NEVER - 1),
                self._appointed.get(layer, NEVER),
                self._wait.get(layer, 0),
            )
            for layer in self._layers
        ]
        return {STATE: torch.tensor(rows, dtype=torch.int64)} if rows else {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Checkpoints of before know nothing of it."""
        rows = state[STATE].tolist() if STATE in state else [(True, False, NEVER - 1, NEVER, 0)] * len(self._layers)
        found = list(zip(self._layers, rows, strict=True))
        self._met, self._away = ({layer for layer, row in found if row[i]} for i in (0, 1))
        self._last = {layer: row[2] for layer, row in found if row[2] >= NEVER}
        self._appointed = {layer: row[3] for layer, row in found if row[3] > NEVER}
        self._wait = {layer: row[4] for layer, row in found if row[4]}

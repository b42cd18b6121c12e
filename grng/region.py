"""Trust regions: the part nu of a direction that is taken.

nu = min(1, sqrt(kappa / (n lr^2 D^T (F + lam I) D))),   nu_l = min(1, eta (1 - mu) min(||W_l||, 3 ||W_l^0||) / ||D_l||)
"""

from typing import Any

import torch
from torch import Tensor

from grng.curvature import Curvature, Layer
from grng.matrices import Matrices
from grng.torch_optim import scalar
from grng.variants import Variant

STATE = "grng_start"  # its name in a checkpoint
GROWTH = 3.0  # of a layer's weights, up to which its region grows with them


class TrustRegion:
    """The model's, by how far its distribution moves, and each layer's, by how far its weights do.

    W^0 are the weights that the first step finds. Were a layer's region to go on growing with its weights, steps made
    of noise, which lengthen weights that they are orthogonal to, would lengthen them by a constant part a step: without
    decay they grow exponentially, until nothing that was learnt is left. Within a constant region ||W||^2 grows by a
    constant, so that the parts that steps are of it fade.

    Args:
        curvature: with kl_clip and step_clip; where neither is given the variant's own hold, else what is given.
        parts: of the variant.
        layers: with their groups and slots.
        matrices: theirs.
    """

    def __init__(self, curvature: Curvature, parts: Variant, layers: list[Layer], matrices: Matrices) -> None:
        if curvature.kl_clip == curvature.step_clip == "auto":
            self.kl_clip, self.step_clip = None, parts.step_clip
        else:
            self.kl_clip, self.step_clip = (
                None if clip == "auto" else clip for clip in (curvature.kl_clip, curvature.step_clip)
            )
        self._layers = layers
        self.place(matrices)

    def place(self, matrices: Matrices) -> None:
        """Begin anew with the matrices of a model that was moved."""
        self._matrices = matrices
        self.start = torch.zeros_like(matrices.least)  # ||W_l^0||, 0 until the first step

    def __call__(
        self,
        groups: list[dict[str, Any]],
        taking: list[Layer],
        quadratic: Tensor,
        squares: Tensor,
        outputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """nu of every matrix, or one number for all of them, and the part of it that is the model's.

        Args:
            groups: of the optimizer, with "lr" and "momentum".
            taking: the layers that move.
            quadratic: <D, (F + lam I) D> of every matrix, in one vector; 0 where it does not move.
            squares: ||D||^2 likewise.
            outputs: n, how many predictions are one sample's.
        """
        # Within momentum, not outside of it: a direction too long for a region must not be remembered as such.
        nu = quadratic.new_ones(())
        if self.step_clip is not None:
            sizes = self._matrices.sizes()
            self.start = torch.where(self.start > 0, self.start, sizes)
            sizes = torch.minimum(sizes, GROWTH * self.start)
            nu = self._matrices.reach(self.step_clip * (1 - self._momenta(groups)) * sizes, squares)
        scale = torch.ones((), dtype=torch.float64, device=quadratic.device)
        if self.kl_clip is not None:
            length = self._squared_length(groups, taking, nu.square() * quadratic)
            scale = kl_scale(self.kl_clip, outputs.to(length) * length).to(scale.dtype)
        return nu * scale, scale

    def state(self) -> dict[str, Tensor]:
        return {STATE: self.start}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.start = state[STATE].clone()

    def _momenta(self, groups: list[dict[str, Any]]) -> float | Tensor:
        """The momentum of every layer; one number where it is the same."""
        momenta = self._by_layer(groups, "momentum")
        if len(momenta) == 1:
            return momenta[0]
        return torch.tensor(momenta, dtype=torch.float64, device=groups[0]["params"][0].device)

    def _squared_length(self, groups: list[dict[str, Any]], taking: list[Layer], quadratic: Tensor) -> Tensor:
        """lr^2 <D, (F + lam I) D> summed over layers, each with the learning rate of its group; the form by matrix."""
        rates = self._by_layer(groups, "lr")
        if len(rates) == 1:
            return scalar(rates[0]) ** 2 * quadratic.sum()
        rate_of = dict(zip(self._layers, rates, strict=True))
        parts = self._matrices.split(quadratic)
        return sum(scalar(rate_of[layer]) ** 2 * parts[layer.group][layer.slots].sum() for layer in taking)

    def _by_layer(self, groups: list[dict[str, Any]], setting: str) -> list[Any]:
        """A setting of every layer's param groups, the largest; a single entry where it is the same for all."""
        values = [group[setting] for group in groups]
        if len({id(value) if isinstance(value, Tensor) else value for value in values}) == 1:
            return values[:1]
        of_parameter = {p: group[setting] for group in groups for p in group["params"]}
        return [largest([of_parameter[p] for p in layer.parameters]) for layer in self._layers]


def largest(values: list[Any]) -> Any:
    """Of numbers, or of tensors without a look at their values.

    >>> largest([0.1, 0.3]), largest([torch.tensor(0.5), 0.1])
    (0.3, tensor(0.5000))
    """
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack([torch.as_tensor(scalar(value)) for value in values]).amax()
    return max(values)


def kl_scale(limit: float, quadratic: Tensor) -> Tensor:
    """nu = min(1, sqrt(kappa / (n lr^2 sum_layers <D, (F + lam I) D>))) given that quadratic form, n included.

    n is how many predictions are one sample's: 784 for the pixels of an image that is put together again, 1 for a class
    (each position's for itself). F is that of the mean over predictions, and without n a network of many outputs would
    move by n times as many nats a sample: a deep autoencoder's first steps then leave the region in which F holds.

    With lam in it, because a step into directions in which F holds next to nothing, and the damping all, would else
    have no bound: F there is known least, and grows fastest after a small initialisation.

    >>> kl_scale(1.0, torch.tensor(4.0)).item()
    0.5
    """
    return (limit / quadratic.clamp(min=torch.finfo(quadratic.dtype).tiny)).sqrt().clamp(max=1)

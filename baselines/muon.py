"""torch.optim.Muon with the AdamW that it needs beside it."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from grng.torch_optim import StrictOptimizer, bare_step

from .common import evaluated


class Muon(StrictOptimizer):
    """torch.optim.Muon for hidden weights and AdamW for all other parameters, as one optimizer.

    Hidden are the weights of Linear layers but for the last, and of convolutions but for the first, these as matrices
    (outputs, everything else); embeddings, biases, norms and what else there is are AdamW's. Muon's update is scaled to
    AdamW's size (adjust_lr_fn "match_rms_adamw"), so that one learning rate and one weight decay serve both.

    Rules: Jordan et al. 2024 and torch's own; Liu et al. 2025 (arXiv 2502.16982) for the scale.

    Args:
        model: its trainable parameters are taken.
        lr: learning rate of both.
        weight_decay: decoupled, of both.
        momentum: Muon's.
        betas: AdamW's.
        adjust_lr_fn: as torch's; with "original" the two learning rates have little in common.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [len(group["params"]) for group in Muon(model).param_groups]  # two hidden weights, the rest
    [2, 4]
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        adjust_lr_fn: str = "match_rms_adamw",
    ) -> None:
        linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        kernels = [m.weight for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
        embedded = {m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
        hidden = {*linear[:-1], *kernels[1:]} - {*linear[-1:], *kernels[:1]} - embedded
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ValueError(f"{type(model).__name__} has no trainable parameter: unfreeze one")
        chosen = [p for p in trained if p in hidden]
        others = [p for p in trained if p not in hidden]
        self._parts: list[Optimizer] = []
        if chosen:
            settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "adjust_lr_fn": adjust_lr_fn}
            part = torch.optim.Muon([p.detach().flatten(1) for p in chosen], **settings)  # type: ignore[arg-type]
            part.param_groups[0]["params"] = chosen
            self._parts.append(part)
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=betas))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._link()

    def _link(self) -> None:
        """Let the parts work on this optimizer's own param groups and state."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_parts": self._parts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's."""
        super().load_state_dict(state_dict)
        self._link()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while it is built: which parameters are hidden is read off the model."""
        if len(getattr(self, "param_groups", ())) == len(self._parts):
            raise RuntimeError("param groups cannot be added to Muon, which reads off the model what is hidden")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what the closure returned."""
        loss = evaluated(closure)
        for part in self._parts:
            if isinstance(part, torch.optim.Muon):
                self._step_as_matrices(part)
            else:
                bare_step(part)
        return loss

    def _step_as_matrices(self, part: torch.optim.Muon) -> None:
        """Muon's step on (outputs, everything else) of each weight: torch's takes nothing but matrices."""
        (group,) = part.param_groups
        matrices = {p: p.detach().flatten(1) for p in group["params"] if p.grad is not None}
        for p, matrix in matrices.items():
            matrix.grad = p.grad.flatten(1)
        part.param_groups = [{**group, "params": list(matrices.values())}]
        part.state = defaultdict(dict, {m: self.state[p] for p, m in matrices.items() if p in self.state})
        try:
            bare_step(part)
            for p, matrix in matrices.items():
                self.state[p] = part.state[matrix]
                if matrix.data_ptr() != p.data_ptr():  # flattened by copying, as of channels_last
                    p.copy_(matrix.view_as(p))
        finally:
            self._link()

"""torch.optim.Muon with the AdamW that it needs beside it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from grng.torch_optim import StrictOptimizer, bare_step

from .common import evaluated


class Muon(StrictOptimizer):
    """torch.optim.Muon for hidden weights and AdamW for all other parameters, as one optimizer.

    Hidden are the weights of Linear layers, but for that of the last one; embeddings, convolutions (torch's Muon takes
    matrices only), biases and norms are AdamW's. Muon's update is scaled to AdamW's size (adjust_lr_fn
    "match_rms_adamw"), so that one learning rate and one weight decay serve both.

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
        embedded = {m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
        hidden = set(linear[:-1]) - set(linear[-1:]) - embedded
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ValueError(f"{type(model).__name__} has no trainable parameter: unfreeze one")
        chosen = [p for p in trained if p in hidden]
        others = [p for p in trained if p not in hidden]
        self._parts: list[Optimizer] = []
        if chosen:
            settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "adjust_lr_fn": adjust_lr_fn}
            self._parts.append(torch.optim.Muon(chosen, **settings))  # type: ignore[arg-type]
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
            bare_step(part)
        return loss

"""Lightning's Trainer, which hands the optimizer a closure, beside a loop of one's own."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from grng import GRNG, GRNGWarning
from grng.regularizers import GNP, Regularized

from .cases import mlp, relative, vector

lightning = pytest.importorskip("pytorch_lightning")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

EPOCHS, BATCH = 4, 8
torch.manual_seed(0)
X, Y = torch.randn(24, 4), torch.arange(24) % 3
DATA = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=BATCH)

MAKERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "ring": lambda model: GRNG(model, "ring"),
    "ekfac": lambda model: GRNG(model, "ekfac"),
    "kalman": lambda model: GRNG(model, "kalman"),
    "reng-double": lambda model: GRNG(model, "reng"),
    "reng-finite": lambda model: GRNG(model, "reng", mode="finite"),
    "ring-gnp": lambda model: GRNG(model, "ring", regularizer=GNP(r=0.05, alpha=0.8)),
    "adamw-gnp": lambda model: Regularized(torch.optim.AdamW(model.parameters()), GNP(r=0.05, alpha=0.8)),
}
ONE_PASS = ("ring", "ekfac", "kalman")
PASSES = tuple(name for name in MAKERS if name not in ONE_PASS)


class Classifier(lightning.LightningModule):
    """A network and the optimizer of it; `whole`: the optimizer is given this module in place of its network."""

    def __init__(self, make: Callable[[nn.Module], Optimizer], whole: bool = False, own: bool = False) -> None:
        super().__init__()
        self.network, self.make, self.whole, self.own = mlp(4, 6, 3, dtype=torch.float32), make, whole, own

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return cross_entropy((self if self.own else self.network)(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("loss", self.training_step(batch, index))

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self if self.whole else self.network)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


def train(model: Classifier, epochs: int = EPOCHS, resume: Path | None = None, **settings: Any) -> Any:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice: workers, private torch
        warnings.simplefilter("error", GRNGWarning)
        trainer.fit(model, DATA, DATA, ckpt_path=resume, weights_only=False)
    return trainer


def by_hand(make: Callable[[nn.Module], Optimizer], accumulate: int = 1, clip: float | None = None) -> Tensor:
    network = mlp(4, 6, 3, dtype=torch.float32)
    optimizer = make(network)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    torch.manual_seed(2)
    for _ in range(EPOCHS):
        for index in range(len(DATA)):
            rows = slice(BATCH * index, BATCH * (index + 1))

            def closure(rows: slice = rows) -> Tensor:
                if accumulate == 1:
                    optimizer.zero_grad()
                loss = cross_entropy(network(X[rows]), Y[rows]) / accumulate
                loss.backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(network.parameters(), clip)
                return loss

            if accumulate == 1:
                optimizer.step(closure)
            else:
                closure()
                if index % accumulate == accumulate - 1 or index == len(DATA) - 1:
                    optimizer.step()
                    optimizer.zero_grad()
        schedule.step()
    return vector(network)


@pytest.mark.parametrize("way", ["plain", "accumulation", "clipping"])
@pytest.mark.parametrize("name", list(MAKERS))
def test_the_same_as_a_loop_of_ones_own(name: str, way: str) -> None:
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "accumulation": {"accumulate_grad_batches": 2},
        "clipping": {"gradient_clip_val": 0.05},
    }
    model = Classifier(MAKERS[name])
    if way == "accumulation" and name in PASSES:
        with pytest.raises(RuntimeError, match="adds to gradients that were there before"):
            train(model, **settings[way])
        return
    trainer = train(model, **settings[way])
    expected = by_hand(MAKERS[name], 2 if way == "accumulation" else 1, 0.05 if way == "clipping" else None)
    assert relative(vector(model.network), expected) < 1e-6
    (optimizer,) = trainer.optimizers
    if isinstance(optimizer, GRNG):
        assert {row.verified for row in optimizer.coverage()} == {"yes"}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("name", list(MAKERS))
def test_a_run_gone_on_with_equals_the_whole(name: str, precision: str, tmp_path: Path) -> None:
    # Lightning reads a checkpoint into the model before it makes that float64, which would round the weights.
    dtype = torch.float64 if precision == "64-true" else torch.float32
    whole, half, rest = (Classifier(MAKERS[name]).to(dtype) for _ in range(3))
    train(whole, precision=precision)
    train(half, epochs=2, precision=precision).save_checkpoint(tmp_path / "half.ckpt")
    train(rest, precision=precision, resume=tmp_path / "half.ckpt")
    assert not torch.equal(vector(half.network), vector(whole.network))
    assert torch.equal(vector(rest.network), vector(whole.network))


@pytest.mark.parametrize("name", list(MAKERS))
def test_a_scaler_without_a_closure(name: str) -> None:
    """Lightning's scaler leaves the closure out; what takes passes says so, the rest divides by the scale."""
    from pytorch_lightning.plugins import MixedPrecision

    model = Classifier(MAKERS[name])
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    if name in PASSES:
        with pytest.raises(RuntimeError, match="takes a second pass"):
            train(model, plugins=plugin)
        return
    (optimizer,) = train(model, plugins=plugin).optimizers
    assert {row.verified for row in optimizer.coverage()} == {"yes"}
    # Rounding to float16, not the scale, of which a thousandth would be left.
    assert relative(vector(model.network), by_hand(MAKERS[name])) < 0.05


@pytest.mark.parametrize("own", [False, True], ids=["calls-network", "calls-itself"])
@pytest.mark.parametrize("whole", [False, True], ids=["given-network", "given-module"])
def test_the_module_that_is_called(whole: bool, own: bool) -> None:
    """GRNG works with the module that training_step calls, or a part of it; of another it sees no pass and says so."""
    model = Classifier(MAKERS["ring"], whole, own)
    if whole and not own:
        with pytest.raises(GRNGWarning, match="saw no forward pass"):
            train(model)
        return
    (optimizer,) = train(model).optimizers
    assert {row.verified for row in optimizer.coverage()} == {"yes"}
    assert relative(vector(model.network), by_hand(MAKERS["ring"])) < 1e-6

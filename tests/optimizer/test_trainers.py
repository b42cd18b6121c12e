"""Loops that others have written: transformers' Trainer and accelerate, which wrap model, loss and optimizer."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from grng import GRNG, GRNGWarning

from .cases import mlp, relative, vector

LENGTH, TOKENS, CLASSES, SAMPLES = 8, 20, 3, 48
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
}


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=CLASSES,
    )
    return transformers.BertForSequenceClassification(config)


def lora() -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(bert(), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))


def sentences() -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    tokens = torch.randint(1, TOKENS, (SAMPLES, LENGTH))
    return [{"input_ids": row, "labels": row[0] % CLASSES} for row in tokens]


def train(folder: Path, variant: str, build: Any, resume: str | None = None, **settings: Any) -> tuple[Tensor, GRNG]:
    """Three epochs by Trainer, with a checkpoint after every third step; the weights, and the optimizer."""
    transformers = pytest.importorskip("transformers")
    transformers.set_seed(1)
    model = build()
    optimizer = GRNG(model, variant)
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        num_train_epochs=3,
        save_steps=3,
        eval_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    data = sentences()
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data[:8], optimizers=(optimizer, None)
    )
    trainer.train(resume_from_checkpoint=resume and str(folder / resume))
    optimizer.close()
    return vector(model), optimizer


@pytest.mark.parametrize("build", [bert, lora])
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("variant", ["ring", "kalman"])
def test_trainer(variant: str, way: str, build: Any, tmp_path: Path) -> None:
    """Every layer is measured, without a word; and a run that is gone on with ends where the whole one did, to the bit:
    but under accumulation, where Trainer goes on with other batches, under AdamW as well."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", GRNGWarning)
        whole, optimizer = train(tmp_path, variant, build, **WAYS[way])
        assert {row.verified for row in optimizer.coverage()} == {"yes"}
        if way != "accumulation":
            resumed, _ = train(tmp_path, variant, build, "checkpoint-3", **WAYS[way])
            assert torch.equal(whole, resumed)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("variant", ["ring", "kalman", "ekfac"])
def test_accelerate(variant: str, precision: str) -> None:
    """A loop of one's own under accelerate, with accumulation and clipping, beside the same without it."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # Accelerator() is one to a process
    torch.manual_seed(0)
    x, y = torch.randn(24, 4), torch.arange(24) % CLASSES

    def run(around: bool) -> tuple[Tensor, GRNG]:
        torch.manual_seed(0)
        model = mlp(4, 6, 3, dtype=torch.float32)
        optimizer = GRNG(model, variant)
        if around:
            accelerator = accelerate.Accelerator(mixed_precision=precision, cpu=True, gradient_accumulation_steps=2)
            called, stepped = accelerator.prepare(model, optimizer)
        for batch in range(12):
            rows = slice(8 * (batch % 3), 8 * (batch % 3) + 8)
            if around:
                with accelerator.accumulate(called):
                    accelerator.backward(cross_entropy(called(x[rows]), y[rows]))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(called.parameters(), 0.5)
                    stepped.step()
                    stepped.zero_grad()
            else:
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    f = model(x[rows])
                (cross_entropy(f.float(), y[rows]) / 2).backward()
                if batch % 2:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
        optimizer.close()
        return vector(model), optimizer

    (found, optimizer), (expected, _) = run(True), run(False)
    assert {row.verified for row in optimizer.coverage()} == {"yes"}
    # In bfloat16 accelerate returns logits in float32, and so is the gradient that is read there.
    assert relative(found, expected) < (1e-6 if precision == "no" else 1e-2)

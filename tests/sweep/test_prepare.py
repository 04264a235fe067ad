"""`sweep prepare`, as it is typed: every format becomes shards with a report; through Ray, and killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from transformers.utils.logging import disable_progress_bar

from data.corpus import synthetic
from data.corpus.schema import SAMPLE_RATE
from data.preparation.build import prepare
from data.preparation.shard_jobs import serially
from data.shards.dataset import Shards
from tests.data.makers import MAKERS, Dialogues, Maker, Said, write
from tests.model import voices
from tests.sweep.common import sweep, tree

SESSIONS = 8


def dialogues() -> Dialogues:
    """Sessions of different words that all have every label, in turns of two seconds."""
    labels = {"therapist": ("question", "reflection", "other"), "client": ("change", "neutral", "sustain")}
    return {
        str(session): [
            Said(role, f"s{session}t{turn} words", labels[role][turn // 2 % 3], 2 * turn, 2 * turn + 2)
            for turn in range(12)
            for role in [("therapist", "client")[turn % 2]]
        ]
        for session in range(SESSIONS)
    }


def record(folder: Path, maker: Maker) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, said in dialogues().items():
        noise = rng.standard_normal(said[-1].end * SAMPLE_RATE) * 0.05
        soundfile.write(folder / maker.audio.format(name), noise, SAMPLE_RATE)
    return folder


@pytest.mark.parametrize("name", [name for name in MAKERS if not name.startswith("table-")])
def test_every_format_becomes_shards_with_a_report(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = MAKERS[name]
    monkeypatch.chdir(tmp_path)
    source = write(maker, tmp_path / "source", maker.files(dialogues()))
    settings = json.loads(maker.config.model_dump_json(exclude_defaults=True))
    Path("settings.yaml").write_text(yaml.safe_dump(settings))
    with_sound = ["--audio", record(tmp_path / "audio", maker)] if maker.times else []
    outcome = sweep("prepare", maker.format, source, *with_sound, "--config", "settings.yaml", "--out", "new")
    assert (outcome.code, outcome.err) == (0, "")
    shards = Shards("new")
    shards.verify()
    assert f"{maker.format}: {SESSIONS} sessions, {12 * SESSIONS} turns" in outcome.out
    for split in ("train", "val", "test"):
        row = next(line for line in outcome.out.splitlines() if line.startswith(f"│ {split} "))
        assert [cell.strip() for cell in row.strip("│").split("│")][1:3] == [
            str(shards.manifest.sessions[split]),
            str(shards.manifest.turns[split]),
        ]
    assert bool(sum(shards.manifest.hours.values())) == maker.times
    assert bool(shards.manifest.labels) == maker.labels
    assert "<audio" in Path("new/report.html").read_text() or not maker.times
    before = tree(tmp_path)
    again = sweep("prepare", maker.format, source, *with_sound, "--config", "settings.yaml", "--out", "new")
    assert (again.code, tree(tmp_path)) == (0, before)


def test_times_in_whole_seconds_are_aligned(
    ctc: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    disable_progress_bar()  # as main() does before transformers is imported
    Path("audio").mkdir()
    lines, truth = ["conversation\tspeaker\ttext\tstart"], {}
    for seed in range(3):
        pcm, turns, times = voices.session(seed, n_turns=16)
        soundfile.write(f"audio/{seed}.wav", pcm, SAMPLE_RATE)
        lines += [f"{seed}\t{turn.speaker}\t{turn.text}\t{turn.start:.0f}" for turn in turns]
        truth |= {f"{seed}/{turn.index}": span for turn, span in zip(turns, times, strict=True)}
    Path("turns.tsv").write_text("\n".join(lines) + "\n")
    options = ["--audio", "audio", "--set", "columns.start=start"]
    monkeypatch.setattr("sweep.cli.prepare.make_shards", serially)
    for out, more in {"given": [], "aligned": ["--align", ctc]}.items():
        outcome = sweep("prepare", "table", "turns.tsv", *options, *more, "--out", out)
        assert (outcome.code, outcome.err) == (0, "")
    given, aligned = Shards("given").columns, Shards("aligned").columns
    sure = [row for row, start in enumerate(aligned["given_start"]) if start is not None]
    assert len(sure) >= 0.85 * len(truth)
    spans = np.array([truth[name] for name in aligned["id"]])[sure]

    def error(columns: dict[str, list[float]]) -> np.ndarray:
        times = [[columns[name][row] or np.nan for name in ("t_start", "t_end")] for row in sure]
        return np.nanmedian(abs(np.array(times, dtype=float) - spans), axis=0)

    assert error(given)[0] > 0.4
    assert (error(aligned) < 0.08).all()
    for row in range(len(truth)):
        moved = row in sure
        assert aligned["given_start"][row] == (given["t_start"][row] if moved else None)
        assert moved or aligned["t_start"][row] == given["t_start"][row]
        assert not moved or aligned["n_samples"][row] > 0
        assert not moved or "W_TS_" not in aligned["flags"][row].replace("W_TS_OVERLAP", "")
    found = Shards("aligned").manifest.findings
    assert found.get("W_ALIGN_LOW", 0) == len(truth) - len(sure)
    assert "Alignment" in Path("aligned/report.html").read_text()
    wrong = sweep("prepare", "table", "turns.tsv", *options, "--align", models / "llm", "--out", "new")
    assert wrong.code == 2
    assert "align.model: " in wrong.err
    assert not Path("new").exists()


def test_shards_can_be_looked_at(here: Path, corpus: Shards) -> None:
    columns = corpus.columns
    row = next(row for row, samples in enumerate(columns["n_samples"]) if samples)
    models = yaml.safe_load((here / "good.yaml").read_text())["model"]
    own = [f"model.{part}.path={models[part]['path']}" for part in ("encoder", "llm")]
    sets = [word for value in own for word in ("--set", value)]
    outcome = sweep("inspect", corpus.folder, *sets, "--example", columns["id"][row])
    assert (outcome.code, outcome.err) == (0, "")
    start, end = columns["t_start"][row], columns["t_end"][row]
    assert f"fingerprint {corpus.fingerprint}" in outcome.out
    assert f"{start:.2f}-{end:.2f} s of the recording" in outcome.out
    line = next(line for line in outcome.out.splitlines() if line.startswith("  clip "))
    first, last, length = (int(word) for word in line.split() if word.isdigit())
    embeddings = next(line for line in outcome.out.splitlines() if "embeddings]" in line)
    assert f"→ {last - first + 1} embeddings]" in embeddings
    assert last < length
    mask = next(line for line in outcome.out.splitlines() if "loss mask" in line)
    targets = next(line for line in outcome.out.splitlines() if "loss over" in line)
    assert mask.count("■") == targets.count("|") + 1


# Shards of a few kB, so that a small corpus has many: the limits are those of the process that plans them.
SMALL = """
import sys
from data.preparation import shard_jobs
from sweep.cli import app, prepare
shard_jobs.SHARD_BYTES, prepare.WORTH_RAY = 1 << 17, 2
sys.argv = ["sweep", *sys.argv[1:]]
app.main()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_makes_the_same_shards_and_a_kill_costs_little(tmp_path: Path) -> None:
    """The whole group of processes is killed with shards half made; the same command goes on, and repeats none."""
    command = [sys.executable, "-c", SMALL, "prepare", "synthetic", "--out", "new", "--set", "sessions=16"]
    root = str(Path(__file__).parents[2])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    options = {"cwd": tmp_path, "env": environment | {"PYTHONPATH": root}, "text": True}
    first = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    while not list((tmp_path / "new").glob("shard-*")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "new").glob("shard-*")}
    assert not (tmp_path / "new" / "manifest.json").exists()
    second = subprocess.run(command, capture_output=True, check=False, **options)
    assert (second.returncode, second.stderr) == (0, "")
    shards = Shards(tmp_path / "new")
    shards.verify()
    assert len(written) < len(shards.manifest.shards)
    for name, changed in written.items():
        assert (tmp_path / "new" / name).stat().st_mtime_ns == changed
    assert "prepared 16 of 16 sessions" in second.stdout
    assert "prepared 0 of 16 sessions" not in second.stdout
    assert shards.fingerprint == prepare(synthetic.corpus(sessions=16), tmp_path / "here").fingerprint

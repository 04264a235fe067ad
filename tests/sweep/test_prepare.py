"""`sweep prepare`: a format becomes shards with a report, through Ray and after a kill; `sweep inspect` shows them."""

import json
import os
import shlex
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from transformers.utils.logging import disable_progress_bar

from data.corpus import synthetic
from data.corpus.schema import SAMPLE_RATE
from data.importers import IMPORTERS
from data.preparation import shard_jobs
from data.preparation.build import prepare
from data.preparation.shard_jobs import serially
from data.report import charts
from data.shards.dataset import Shards
from sweep.cli import prepare as prepare_command
from sweep.cli.prepare import load_corpus_settings
from tests.data.makers import MAKERS, Said, write
from tests.data.test_huggingface import write_parquet
from tests.forked import Forked
from tests.model import voices
from tests.sweep.common import Outcome, sweep, tree

SESSIONS = 8
LABELS = {"therapist": ("question", "reflection", "other"), "client": ("change", "neutral", "sustain")}
# Sessions of different words that all have every label, in turns of two seconds.
DIALOGUES = {
    str(session): [
        Said(role, f"s{session}t{turn} words", LABELS[role][turn // 2 % 3], 2 * turn, 2 * turn + 2)
        for turn in range(12)
        for role in [("therapist", "client")[turn % 2]]
    ]
    for session in range(SESSIONS)
}
BY_FORMAT = {maker.format: maker for maker in reversed(MAKERS.values())}  # the first maker of each format


def example(name: str) -> list[str]:
    """Return the words of a format's example, which the documentation has as well."""
    command = f"prepare {name} {IMPORTERS[name].example} --out corpus"
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert f"\nsweep {command}\n" in page
    return shlex.split(command)


SHORT = ("whisperx",)  # with audio; `tests/data` reads every format


@pytest.mark.parametrize("name", BY_FORMAT)
def test_example_of_every_format_runs_and_is_documented(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source has the names of files and speakers that the example has, and what it does not name is usual."""
    monkeypatch.setattr(charts, "_svg", lambda figure: "")  # which takes most of the time; the test below looks at them
    maker, words = BY_FORMAT[name], example(name)
    monkeypatch.chdir(tmp_path)
    settings = load_corpus_settings(None, [word for word in words if "=" in word])
    names = {role: speaker for speaker, role in settings.roles.items()}
    renamed = {
        session: [turn._replace(speaker=names.get(turn.speaker, turn.speaker)) for turn in said]
        for session, said in DIALOGUES.items()
    }
    files = maker.files(renamed)
    if settings.columns.label is not None:
        files = {file: text.replace("label", settings.columns.label, 1) for file, text in files.items()}
    source = write(maker, tmp_path / "made", files)
    place = tmp_path / words[2]
    place = place / source.name if source.is_file() and not place.suffix else place
    place.parent.mkdir(parents=True, exist_ok=True)
    source.rename(place)
    if "--audio" in words:
        (tmp_path / "recordings").mkdir()
        for session in DIALOGUES:
            noise = np.random.default_rng(int(session)).standard_normal(24 * SAMPLE_RATE) * 0.05
            soundfile.write(tmp_path / "recordings" / maker.audio.format(session), noise, SAMPLE_RATE)
    assert sweep(*words).code == 0
    shards = Shards(str(tmp_path / "corpus"))
    turns = list(zip(shards.columns["speaker"], shards.columns["text"], strict=True))
    assert turns == [(turn.speaker, turn.text) for _, said in sorted(DIALOGUES.items()) for turn in said]


def test_example_of_a_dataset_with_audio_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are no text, so no maker writes them."""
    assert set(IMPORTERS) == {*BY_FORMAT, "huggingface"}
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "dataset")
    assert sweep(*example("huggingface")).code == 0
    assert set(Shards(str(tmp_path / "corpus")).columns["split"]) == {"train", "val", "test"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SHORT else pytest.mark.long)
        for name in MAKERS
        if not name.startswith("table-")
    ],
)
def test_format_becomes_shards_with_a_report(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = MAKERS[name]
    monkeypatch.chdir(tmp_path)
    source = write(maker, tmp_path / "source", maker.files(DIALOGUES))
    Path("settings.yaml").write_text(yaml.safe_dump(json.loads(maker.config.model_dump_json(exclude_defaults=True))))
    command = ["prepare", maker.format, source, "--config", "settings.yaml", "--out", "new"]
    if maker.times:
        (audio := tmp_path / "audio").mkdir()
        rng = np.random.default_rng(0)
        for session in DIALOGUES:
            noise = rng.standard_normal(24 * SAMPLE_RATE) * 0.05
            soundfile.write(audio / maker.audio.format(session), noise, SAMPLE_RATE)
        command += ["--audio", audio]
    outcome = sweep(*command)
    assert (outcome.code, outcome.err) == (0, "")
    shards = Shards("new")
    shards.verify()
    assert f"{maker.format}: {SESSIONS} sessions, {12 * SESSIONS} turns" in outcome.out
    for split in ("train", "val", "test"):
        row = next(line for line in outcome.out.splitlines() if line.startswith(f"│ {split} "))
        counts = [str(shards.manifest.sessions[split]), str(shards.manifest.turns[split])]
        assert [cell.strip() for cell in row.strip("│").split("│")][1:3] == counts
    assert bool(sum(shards.manifest.hours.values())) == maker.times
    assert bool(shards.manifest.labels) == maker.labels
    assert "<audio" in Path("new/report.html").read_text() or not maker.times
    before = tree(tmp_path)
    assert (sweep(*command).code, tree(tmp_path)) == (0, before)


def test_align_refuses_what_is_no_ctc_model(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = sweep("prepare", "synthetic", "--set", "sessions=9", "--align", models / "llm", "--out", "new")
    assert (outcome.code, "align.model: " in outcome.err, Path("new").exists()) == (2, True, False)


@pytest.mark.long  # `tests/model` aligns the same voices
def test_align_finds_the_times_of_turns(ctc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    disable_progress_bar()  # as main() does before transformers is imported
    monkeypatch.setattr("sweep.cli.prepare.make_shards", serially)
    Path("audio").mkdir()
    lines, truth = ["conversation\tspeaker\ttext\tstart"], {}
    for seed in range(3):
        pcm, turns, times = voices.session(seed, n_turns=16)
        soundfile.write(f"audio/{seed}.wav", pcm, SAMPLE_RATE)
        lines += [f"{seed}\t{turn.speaker}\t{turn.text}\t{turn.start:.0f}" for turn in turns]
        truth |= {f"{seed}/{turn.index}": span for turn, span in zip(turns, times, strict=True)}
    Path("turns.tsv").write_text("\n".join(lines) + "\n")
    for out, more in {"given": [], "aligned": ["--align", ctc]}.items():
        options = ["--audio", "audio", "--set", "columns.start=start", *more, "--out", out]
        outcome = sweep("prepare", "table", "turns.tsv", *options)
        assert (outcome.code, outcome.err) == (0, "")
    given, aligned = Shards("given").columns, Shards("aligned").columns
    moved = [row for row, start in enumerate(aligned["given_start"]) if start is not None]
    assert len(moved) >= 0.85 * len(truth)
    spans = np.array([truth[name] for name in aligned["id"]])[moved]

    def error(columns: dict[str, list[float]]) -> np.ndarray:
        times = [[columns[name][row] or np.nan for name in ("t_start", "t_end")] for row in moved]
        return np.nanmedian(abs(np.array(times, dtype=float) - spans), axis=0)

    assert error(given)[0] > 0.4
    assert (error(aligned) < 0.08).all()
    for row in range(len(truth)):
        assert aligned["given_start"][row] == (given["t_start"][row] if row in moved else None)
        if row in moved:
            assert aligned["n_samples"][row] > 0
            assert "W_TS_" not in aligned["flags"][row].replace("W_TS_OVERLAP", "")
        else:
            assert aligned["t_start"][row] == given["t_start"][row]
    assert Shards("aligned").manifest.findings.get("W_ALIGN_LOW", 0) == len(truth) - len(moved)
    assert "Alignment" in Path("aligned/report.html").read_text()


def test_inspect_shows_an_example_of_a_corpus(here: Path, corpus: Shards) -> None:
    columns = corpus.columns
    row = next(row for row, samples in enumerate(columns["n_samples"]) if samples)
    models = yaml.safe_load((here / "good.yaml").read_text())["model"]
    paths = [f"--set=model.{part}.path={models[part]['path']}" for part in ("encoder", "llm")]
    outcome = sweep("inspect", corpus.folder, *paths, "--example", columns["id"][row])
    assert (outcome.code, outcome.err) == (0, "")
    assert f"fingerprint {corpus.fingerprint}" in outcome.out
    assert f"{columns['t_start'][row]:.2f}-{columns['t_end'][row]:.2f} s of the recording" in outcome.out

    def line(part: str) -> str:
        return next(line for line in outcome.out.splitlines() if part in line)

    first, last, length = (int(word) for word in line("  clip ").split() if word.isdigit())
    assert f"→ {last - first + 1} embeddings]" in line("embeddings]")
    assert last < length
    assert line("loss mask").count("■") == line("loss over").count("|") + 1


def prepare_small(folder: Path, worth_ray: int) -> Outcome:
    """Prepare shards of a few kB, so that a small corpus has many: the limit is that of the process that plans them."""
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # each CPU is one more process of Ray Data
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]
    os.chdir(folder)
    shard_jobs.SHARD_BYTES, prepare_command.WORTH_RAY = 1 << 17, worth_ray
    return sweep("prepare", "synthetic", "--out", "new", "--set", "sessions=16")


@pytest.mark.long  # tests/data kills a preparation at any moment
@pytest.mark.timeout(300)
def test_ray_resumes_a_killed_preparation(tmp_path: Path) -> None:
    """A process is killed with shards half made; the same command under Ray writes the others, and none twice."""
    first = Forked(lambda: prepare_small(tmp_path, worth_ray=999))
    while not list((tmp_path / "new").glob("shard-*")):
        assert first.process.is_alive()
        time.sleep(0.01)
    first.process.kill()
    first.process.join()
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "new").glob("shard-*")}
    assert not (tmp_path / "new" / "manifest.json").exists()
    second = Forked(lambda: prepare_small(tmp_path, worth_ray=2)).result()
    assert (second.code, second.err) == (0, "")
    shards = Shards(tmp_path / "new")
    shards.verify()
    assert len(written) < len(shards.manifest.shards)
    assert written.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "new").iterdir()}.items()
    assert "prepared 16 of 16 sessions" in second.out
    assert "prepared 0 of 16 sessions" not in second.out
    assert shards.fingerprint == prepare(synthetic.corpus(sessions=16), tmp_path / "here").fingerprint


def test_format_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(MAKERS["mi-tags"], tmp_path / "source", MAKERS["mi-tags"].files(DIALOGUES))
    outcome = sweep("prepare", source, "--out", "new")
    assert (outcome.code, outcome.err) == (0, "")
    assert "format:   mi-tags (" in outcome.out
    assert Shards("new").manifest.corpus == "mi-tags"


def test_formats_lists_every_format_with_an_example() -> None:
    lines = sweep("formats").out.splitlines()
    assert [line.split()[0] for line in lines[::2]] == [*IMPORTERS, "synthetic"]
    assert all(line.split()[:2] == ["sweep", "prepare"] and "--out" in line for line in lines[1::2])

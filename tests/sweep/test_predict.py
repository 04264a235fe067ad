"""`predict`: an exported model codes sessions as `evaluate` does, and lists every other turn with the reason."""

import csv
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import soundfile
import yaml

from data.corpus import synthetic
from data.corpus.schema import SAMPLE_RATE
from data.shards.dataset import Shards
from sweep.export.predict import softmax
from tests.conftest import LABELS
from tests.data.test_annomi import write as annomi
from tests.sweep.common import complaint, refused, sweep, tree

HEADER = ["conversation", "id", "speaker", "text", "code", "clip"]
MAPPING = {"columns": {"id": "id", "label": "code", "clip": "clip"}}
MODELS = {  # by modality, what else is special about it
    "text+speech": ("cls=before",),
    "speech": ("trainable=new+encoder.*.layers.1.*",),
    "text": ("priors=balanced",),
    "audio LLM": ("modality=text+speech", "encoder.path=null", "llm.path={models}/qwen2-audio"),
}
Rows = list[dict[str, str]]


def write_table(path: Path, rows: Rows, header: Sequence[str] = HEADER) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def write_corpus(folder: Path) -> Rows:
    """Nine synthetic dialogues as a table, with a recording of every client turn."""
    (folder / "clips").mkdir()
    rows = []
    for conversation in synthetic.corpus(sessions=9, turns=8, seed=3).conversations:
        for turn in conversation.turns:
            clip = "" if turn.audio is None else f"{turn.id.replace('/', '-')}.wav"
            if turn.audio is not None:
                soundfile.write(folder / "clips" / clip, turn.audio, SAMPLE_RATE, subtype="PCM_16")
            cells = [conversation.id, turn.id.partition("/")[2], turn.speaker, turn.text, turn.label or "", clip]
            rows.append(dict(zip(HEADER, cells, strict=True)))
    write_table(folder / "corpus.csv", rows)
    (folder / "mapping.yaml").write_text(json.dumps(MAPPING))
    return rows


@pytest.fixture(scope="module")
def made(place: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus as a table, its shards, a trial of each modality, and these exported."""
    folder = tmp_path_factory.mktemp("made")
    write_corpus(folder)
    source = ("table", folder / "corpus.csv", "--audio", folder / "clips", "--config", folder / "mapping.yaml")
    assert sweep("prepare", *source, "--out", folder / "shards").code == 0
    changed = [f"--set=data.shards={folder / 'shards'}", "--set=train.epochs=1", "--set=model.end_of_audio=learned"]
    for modality, settings in MODELS.items():
        trial = folder / f"trial-{modality}"
        special = [f"--set=model.{setting.format(models=models)}" for setting in settings]
        modalities = [] if "LLM" in modality else [f"--set=model.modality={modality}"]
        options = (*changed, *modalities, *special, "--out", trial)
        assert sweep("train", place / "good.yaml", *options).code == 0
        assert sweep("export", trial, "--out", folder / modality).code == 0
    return folder


@pytest.fixture
def work(here: Path, made: Path) -> Path:
    """A working folder with a table of one session of the validation split, whose codes are left out."""
    columns = Shards(made / "shards").columns
    session = columns["conversation"][columns["split"].index("val")]
    rows = [row for row in read(made / "corpus.csv") if row["conversation"] == session]
    write_table(here / "new.csv", rows, [name for name in HEADER if name != "code"])
    (here / "mapping.yaml").write_text(json.dumps(MAPPING))
    return here


def read(path: Path) -> Rows:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def options(made: Path, table: str = "new.csv") -> tuple[object, ...]:
    return "--csv", table, "--audio", made / "clips", "--config", "mapping.yaml"


def predict(model: Path, *args: object, out: str = "coded") -> tuple[Rows, str]:
    """Code the sessions, and return the rows of the table and the text that was printed."""
    outcome = sweep("predict", model, *args, "--out", out)
    assert (outcome.code, outcome.err) == (0, "")
    return read(Path(out) / "predictions.csv"), outcome.out


def evaluated(trial: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(sweep("evaluate", trial, "--split", "val", "--json").out)["predictions"]
    return rows


@pytest.mark.parametrize("modality", MODELS)
def test_predictions_are_those_of_evaluate(modality: str, work: Path, made: Path) -> None:
    rows, out = predict(made / modality, *options(made))
    assert "coded 4 of 8 turns; 4 are listed with the reason" in out
    by_id = {row["id"]: row for row in evaluated(made / f"trial-{modality}")}
    assert [row["turn"] for row in rows] == [str(turn) for turn in range(8)]
    for row in rows:
        expected = by_id.get(f"{row['session']}/{row['turn']}")
        if expected is None:
            assert (row["speaker"], row["code"], row["probability"]) == ("therapist", "", "")
            assert row["not_coded"] == "only turns of the client are coded"
            continue
        shares = dict(zip(expected["scores"], softmax(list(expected["scores"].values())), strict=True))
        assert {label: float(row[f"p_{label}"]) for label in LABELS} == pytest.approx(shares, rel=1e-5)
        assert (row["code"], row["task"], row["not_coded"]) == (expected["prediction"], "classify", "")
        assert float(row["probability"]) == pytest.approx(max(shares.values()), rel=1e-5)
        assert row["text"]
    assert len({row["probability"] for row in rows}) > 3, "the turns must differ for this to test anything"


def test_page_escapes_everything_and_needs_nothing(work: Path, made: Path) -> None:
    rows = read(work / "new.csv")
    rows[1]["text"] = "<script>alert('x')</script> & \"more\""
    for row in rows:
        row["conversation"] = "<b>s</b>"
    write_table(work / "new.csv", rows)
    coded, _ = predict(made / "text+speech", *options(made))
    page = Path("coded/transcript.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;more&#34;" in page
    assert page.count("<audio ") == 4
    assert not re.findall(r"""(?:src|href)=["'](?!data:audio/(?:mpeg|flac);base64,|#s)""", page)
    assert all(f">{label}</span>" in page for label in {row["code"] for row in coded} - {""})
    assert page.count("only turns of the client are coded") == 5, "each of the four turns, and their count at the top"


def test_turns_that_cannot_be_coded_have_a_reason(work: Path, made: Path) -> None:
    rows = read(work / "new.csv")
    client = [row for row in rows if row["clip"]]
    client[0]["clip"] = ""
    client[1]["clip"] = "gone.wav"
    client[2]["speaker"] = "somebody"
    write_table(work / "new.csv", rows)
    coded, _ = predict(made / "text+speech", *options(made))
    assert len(coded) == len(rows)
    by_turn = {row["turn"]: row["not_coded"] for row in coded}
    reasons = [by_turn[row["id"]] for row in client]
    assert reasons[0].startswith("no audio: ")
    assert reasons[1] == "the file gone.wav does not exist in clips"
    assert reasons[2].startswith("speaker 'somebody' has no role; add it in --config")
    page = Path("coded/transcript.html").read_text(encoding="utf-8")
    assert page.count("the file gone.wav does not exist in clips") == 2
    client[3]["text"] = " ".join(["really"] * 600)
    write_table(work / "new.csv", rows)
    coded, _ = predict(made / "text", *options(made), out="read")
    by_turn = {row["turn"]: row["not_coded"] for row in coded}
    assert "text tokens exceed model.llm.max_text_tokens (512)" in by_turn[client[3]["id"]]
    assert by_turn[client[0]["id"]] == "", "a model of text needs no recording"


def test_other_formats_are_read_without_codes(work: Path, made: Path) -> None:
    rows = read(work / "new.csv")
    write_table(work / "tags.csv", [row | {"turn": row["id"]} for row in rows], ["turn", "speaker", "text"])
    segments = [
        {"start": i, "end": i + 1, "text": row["text"], "speaker": row["speaker"]} for i, row in enumerate(rows)
    ]
    (work / "whisper.json").write_text(json.dumps({"segments": segments}))
    header = "transcript_id,mi_quality,video_url,utterance_id,interlocutor,timestamp,utterance_text"
    lines = [f"1,high,v,{row['id']},{row['speaker']},00:00:{i:02},{row['text']}" for i, row in enumerate(rows)]
    (work / "annomi.csv").write_text("\n".join([header, *lines]) + "\n")
    codes = []
    for kind, name in {"mi-tags": "tags.csv", "whisperx": "whisper.json", "annomi": "annomi.csv"}.items():
        coded, _ = predict(made / "text", "--csv", name, "--format", kind, out=kind)
        codes.append([(row["code"], row["probability"]) for row in coded])
    assert codes[0] == codes[1] == codes[2]
    assert sum(bool(code) for code, _ in codes[0]) == 4


def test_bad_input_is_one_error_and_leaves_nothing(work: Path, made: Path) -> None:
    speech, text = made / "text+speech", made / "text"
    (work / "empty.csv").write_text("conversation,speaker,text\n")
    (work / "twice.csv").write_text("conversation,id,speaker,text\n1,0,C,hi\n1,0,C,ho\n")
    (work / "strangers.csv").write_text("conversation,speaker,text\n1,A,hi\n1,B,ho\n")
    new = ("--csv", "new.csv", "--config", "mapping.yaml")
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("--out taken: exists already", (speech, *options(made), "--out", "taken")),
        ("--format xml: no such format; use one of annomi", (text, *new, "--format", "xml")),
        (f"{work / 'taken'}: no exported model (no labels.json)", (work / "taken", *new)),
        (f"{speech}: the model needs audio (model.modality text+speech)", (speech, *new)),
        ("missing.csv: no such file or folder", (text, "--csv", "missing.csv")),
        ("empty.csv: no rows", (text, "--csv", "empty.csv")),
        (
            "strangers.csv:2: none of the 2 turns can be coded; 1 x speaker 'A' has no role",
            (text, "--csv", "strangers.csv"),
        ),
        (
            "F_DUPLICATE: 1 id(s) are used for different utterances; make the ids unique, or remove the wrong rows; F_",
            (text, "--csv", "twice.csv", "--set", "columns.id=id"),
        ),
        ("new.csv:1: missing column(s) said", (text, "--csv", "new.csv", "--set", "columns.text=said")),
        (
            "--set: 1 problem\n  - columns.texxt: unknown key",
            (text, "--csv", "new.csv", "--set", "columns.texxt=a"),
        ),
    ]
    segments = [{"start": 0, "end": 1, "text": "hi"}, {"start": 1, "end": 2, "text": "ho", "speaker": "X"}]
    (work / "s.json").write_text(json.dumps({"segments": segments}))
    (work / "sounds").mkdir()
    soundfile.write(work / "sounds" / "s.wav", [0.1] * SAMPLE_RATE * 2, SAMPLE_RATE)
    cases.append(
        (  # a model of speech, and the recording is given: it is not the audio that is missing
            "s.json:segments[0]: none of the 2 turns can be coded; 1 x the turn has no speaker (s.json:segments[0]); "
            "1 x speaker 'X' has no role",
            (speech, "--csv", "s.json", "--format", "whisperx", "--audio", "sounds"),
        )
    )
    for message, words in cases:
        out = () if "--out" in words else ("--out", "o")
        assert refused(work, "predict", *words, *out).startswith(message), message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("speech.safetensors", b"half", "its weights cannot be read"),
        ("labels.json", b"{}", "labels.json: sweep: Field required"),
        ("lora/adapter_model.safetensors", None, "its weights cannot be read"),
    ],
)
def test_damaged_export_is_one_error(name: str, content: bytes | None, message: str, work: Path, made: Path) -> None:
    shutil.copytree(made / "text", "copy")
    path = Path("copy") / name
    path.write_bytes(content) if content is not None else path.unlink()
    assert message in refused(work, "predict", "copy", "--csv", "new.csv", "--out", "o")


def test_exported_folder_may_be_moved(work: Path, made: Path) -> None:
    """Neither the trial nor its corpus is needed."""
    shutil.copytree(made / "text", "moved")
    config = yaml.safe_load(Path("moved/config.yaml").read_text())
    config["data"]["shards"] = "gone"
    Path("moved/config.yaml").write_text(yaml.safe_dump(config))
    predict(Path("moved"), *options(made))
    predict(made / "text", *options(made), out="other")
    assert tree(Path("coded")) == tree(Path("other"))
    assert complaint(sweep("predict", "moved", *options(made), "--out", "coded")).startswith("--out coded: exists")


@pytest.fixture
def export(here: Path) -> Callable[..., Path]:
    """Train a text model of some tasks on twelve AnnoMI sessions of seven turns, `annomi.csv`, and export it."""
    (here / "annomi").mkdir()
    annomi(here / "annomi", sessions=12).rename(here / "annomi.csv")
    assert sweep("prepare", "annomi", "annomi.csv", "--set", "max_rejected=1", "--out", "shards").code == 0

    def run(*settings: str) -> Path:
        changed = ("data.shards=shards", "model.modality=text", "tasks.classify=0", *settings)
        assert sweep("train", "good.yaml", *(f"--set={setting}" for setting in changed), "--out", "trial").code == 0
        assert sweep("export", "trial", "--out", "m").code == 0
        return Path("m")

    return run


ANNOMI = ("--csv", "annomi.csv", "--format", "annomi")


def test_turn_is_coded_by_the_tasks_of_its_role(export: Callable[..., Path], here: Path) -> None:
    """Two tasks are about one role each, and a third one about all turns."""
    model = export("train.epochs=1", "tasks.client_talk=1", "tasks.therapist_behaviour=1", "tasks.classify=1")
    rows, _ = predict(model, *ANNOMI)
    assert len(rows) == 2 * 12 * 7
    task_of = {"client": "client_talk", "therapist": "therapist_behaviour"}
    by_role = [row for row in rows if row["task"] != "classify"]
    assert all(row["task"] == task_of[row["speaker"]] for row in by_role)
    assert all(bool(row["p_change"]) == (row["speaker"] == "client") for row in by_role)
    coded = {(row["task"], f"{row['session']}/{row['turn']}"): row["code"] for row in rows}
    expected = {(row["task"], row["id"]): row["prediction"] for row in evaluated(Path("trial"))}
    assert expected == {key: coded[key] for key in expected}
    assert '<span class="note">client_talk</span>' in Path("coded/transcript.html").read_text(encoding="utf-8")
    write_table(here / "one.csv", [{"conversation": "s", "speaker": "C", "text": "well"}], HEADER[:1] + HEADER[2:4])
    rows, _ = predict(model, "--csv", "one.csv", out="one")
    assert [row["task"] for row in rows if row["task"] != "classify"] == ["client_talk"]


def test_forecasts_replies_and_ratings_are_predicted(export: Callable[..., Path]) -> None:
    tasks = ("tasks.forecast=1", "tasks.response=1", "tasks.quality=1")
    rows, out = predict(export("train.epochs=4", "model.max_new_tokens=4", *tasks), *ANNOMI)
    assert "coded 72 of 84 turns; 12 are listed with the reason; rated 12 sessions" in out
    by_id = {(row["task"], "/".join(filter(None, (row["session"], row["turn"])))): row for row in rows if row["task"]}
    expected = evaluated(Path("trial"))
    assert {record["task"] for record in expected} == {"forecast", "response", "quality"}
    for record in expected:
        row, text = by_id[record["task"], record["id"]], record["task"] == "response"
        answer = (record["prediction"], "") if text else ("", record["prediction"])
        assert (row["reply"], row["code"]) == answer, record
        if not text:
            shares = softmax(list(record["scores"].values()))
            assert [float(row[f"p_{label}"]) for label in record["scores"]] == pytest.approx(shares, rel=1e-5)
    first = [row for row in rows if row["turn"] and not row["task"]]
    assert {row["not_coded"] for row in first} == {"no turn comes before it"}
    replies = [row["reply"] for row in rows if row["task"] == "response"]
    assert {row["speaker"] for row in rows if row["task"] == "response"} == {"therapist"}
    page = Path("coded/transcript.html").read_text(encoding="utf-8")
    assert (page.count("session quality: "), page.count(">reply of the model: ")) == (12, len(replies))
    assert any(replies), "the model must reply for this to test anything"


def test_session_model_rates_sessions_only(export: Callable[..., Path]) -> None:
    rows, out = predict(export("train.epochs=1", "tasks.quality=1"), *ANNOMI)
    assert "coded 0 of 84 turns; 84 are listed with the reason; rated 12 sessions" in out
    assert {row["not_coded"] for row in rows if row["turn"]} == {"only whole sessions are rated"}
    assert all(float(row["p_high"]) + float(row["p_low"]) == pytest.approx(1) for row in rows if not row["turn"])

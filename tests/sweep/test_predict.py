"""`predict`: an exported model codes sessions as `evaluate` would, and says of every other turn why it does not."""

import csv
import json
import re
import shutil
from collections.abc import Sequence
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
    "text+speech": "cls=before",
    "speech": "trainable=new+encoder.*.layers.1.*",
    "text": "priors=balanced",
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
def made(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus as a table, its shards, a trial of each modality, and these exported."""
    folder = tmp_path_factory.mktemp("made")
    write_corpus(folder)
    source = ("table", folder / "corpus.csv", "--audio", folder / "clips", "--config", folder / "mapping.yaml")
    assert sweep("prepare", *source, "--out", folder / "shards").code == 0
    changed = [f"--set=data.shards={folder / 'shards'}", "--set=train.epochs=1", "--set=model.end_of_audio=learned"]
    for modality, setting in MODELS.items():
        trial = folder / f"trial-{modality}"
        options = (*changed, f"--set=model.modality={modality}", f"--set=model.{setting}", "--out", trial)
        assert sweep("train", place / "good.yaml", *options).code == 0
        assert sweep("export", trial, "--out", folder / modality).code == 0
    return folder


@pytest.fixture
def work(here: Path, made: Path) -> Path:
    """A working folder with a table of one session of the validation split, whose codes are left out."""
    shards = Shards(made / "shards")
    name = next(
        one
        for one, split in zip(shards.columns["conversation"], shards.columns["split"], strict=True)
        if split == "val"
    )
    rows = [row for row in read(made / "corpus.csv") if row["conversation"] == name]
    write_table(here / "new.csv", rows, [name for name in HEADER if name != "code"])
    (here / "mapping.yaml").write_text(json.dumps(MAPPING))
    return here


def read(path: Path) -> Rows:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def options(made: Path, table: str = "new.csv") -> tuple[object, ...]:
    return "--csv", table, "--audio", made / "clips", "--config", "mapping.yaml"


def evaluated(trial: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(sweep("evaluate", trial, "--split", "val", "--json").out)["predictions"]
    return found


@pytest.mark.parametrize("modality", MODELS)
def test_predictions_are_those_of_evaluate(modality: str, work: Path, made: Path) -> None:
    outcome = sweep("predict", made / modality, *options(made), "--out", "coded")
    assert (outcome.code, outcome.err) == (0, "")
    assert "coded 4 of 8 turns; 4 are listed with the reason" in outcome.out
    rows = read(Path("coded/predictions.csv"))
    known = {row["id"]: row for row in evaluated(made / f"trial-{modality}")}
    assert [row["turn"] for row in rows] == [str(turn) for turn in range(8)]
    for row in rows:
        said = known.get(f"{row['session']}/{row['turn']}")
        if said is None:
            assert (row["speaker"], row["code"], row["probability"]) == ("therapist", "", "")
            assert row["not_coded"] == "only turns of the client are coded"
            continue
        shares = dict(zip(said["scores"], softmax(list(said["scores"].values())), strict=True))
        assert {label: float(row[f"p_{label}"]) for label in LABELS} == pytest.approx(shares, rel=1e-5)
        assert (row["code"], row["task"], row["not_coded"]) == (said["prediction"], "classify", "")
        assert float(row["probability"]) == pytest.approx(max(shares.values()), rel=1e-5)
        assert row["text"]
    assert len({row["probability"] for row in rows}) > 3, "the turns must be told apart for this to test anything"


def test_the_page_stands_alone_and_escapes_everything(work: Path, made: Path) -> None:
    rows = read(work / "new.csv")
    rows[1]["text"] = "<script>alert('x')</script> & \"more\""
    for row in rows:
        row["conversation"] = "<b>s</b>"
    write_table(work / "new.csv", rows)
    assert sweep("predict", made / "text+speech", *options(made), "--out", "coded").code == 0
    page = Path("coded/transcript.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;more&#34;" in page
    assert page.count("<audio ") == 4
    assert not re.findall(r"""(?:src|href)=["'](?!data:audio/(?:mpeg|flac);base64,|#s)""", page)
    assert all(
        f">{label}</span>" in page for label in {row["code"] for row in read(Path("coded/predictions.csv"))} - {""}
    )
    assert page.count("only turns of the client are coded") == 5, "each of the four turns, and their count at the top"


def test_what_cannot_be_coded_is_listed_with_the_reason(work: Path, made: Path) -> None:
    rows = read(work / "new.csv")
    heard = [row for row in rows if row["clip"]]
    heard[0]["clip"] = ""
    heard[1]["clip"] = "gone.wav"
    heard[2]["speaker"] = "somebody"
    write_table(work / "new.csv", rows)
    assert sweep("predict", made / "text+speech", *options(made), "--out", "coded").code == 0
    coded = {row["turn"]: row for row in read(Path("coded/predictions.csv"))}
    assert len(coded) == len(rows)
    reasons = [coded[row["id"]]["not_coded"] for row in heard]
    assert reasons[0].startswith("no audio: ")
    assert reasons[1] == "the file gone.wav does not exist in clips"
    assert reasons[2].startswith("speaker 'somebody' has no role; add it in --config")
    assert (reasons[3], coded[heard[3]["id"]]["code"] in LABELS) == ("", True)
    page = Path("coded/transcript.html").read_text(encoding="utf-8")
    assert page.count("the file gone.wav does not exist in clips") == 2


def test_a_turn_that_does_not_fit_is_listed(work: Path, made: Path) -> None:
    rows = read(work / "new.csv")
    rows[1]["text"] = " ".join(["really"] * 600)
    write_table(work / "new.csv", rows)
    assert sweep("predict", made / "text", *options(made), "--out", "coded").code == 0
    coded = read(Path("coded/predictions.csv"))
    assert "text tokens exceed model.llm.max_text_tokens (512)" in coded[1]["not_coded"]
    assert [bool(row["code"]) for row in coded] == [False, False, False, True, False, True, False, True]


def test_other_formats_are_read_without_codes(work: Path, made: Path) -> None:
    rows = read(work / "new.csv")
    tagged = [row | {"turn": row["id"]} for row in rows]
    write_table(work / "tags.csv", tagged, ["turn", "speaker", "text"])
    segments = [
        {"start": i, "end": i + 1, "text": row["text"], "speaker": row["speaker"]} for i, row in enumerate(rows)
    ]
    (work / "whisper.json").write_text(json.dumps({"segments": segments}))
    header = "transcript_id,mi_quality,video_url,utterance_id,interlocutor,timestamp,utterance_text"
    lines = [f"1,high,v,{row['id']},{row['speaker']},00:00:{i:02},{row['text']}" for i, row in enumerate(rows)]
    (work / "annomi.csv").write_text("\n".join([header, *lines]) + "\n")
    found = {}
    for kind, name in {"mi-tags": "tags.csv", "whisperx": "whisper.json", "annomi": "annomi.csv"}.items():
        outcome = sweep("predict", made / "text", "--csv", name, "--format", kind, "--out", kind)
        assert (outcome.code, outcome.err) == (0, ""), kind
        found[kind] = [(row["code"], row["probability"]) for row in read(Path(kind) / "predictions.csv")]
    assert found["mi-tags"] == found["whisperx"] == found["annomi"]
    assert sum(bool(code) for code, _ in found["annomi"]) == 4


def test_bad_input_is_one_error_and_leaves_nothing(work: Path, made: Path) -> None:
    listens, reads = made / "text+speech", made / "text"
    (work / "empty.csv").write_text("conversation,speaker,text\n")
    (work / "twice.csv").write_text("conversation,id,speaker,text\n1,0,C,hi\n1,0,C,ho\n")
    (work / "strangers.csv").write_text("conversation,speaker,text\n1,A,hi\n1,B,ho\n")
    new = ("--csv", "new.csv", "--config", "mapping.yaml")
    cases: dict[str, tuple[object, ...]] = {
        "--out taken: exists already": (listens, *options(made), "--out", "taken"),
        "--format xml: no such format; use one of annomi": (reads, *new, "--format", "xml", "--out", "o"),
        f"{work / 'taken'}: no exported model (no labels.json)": (work / "taken", *new, "--out", "o"),
        f"{listens}: the model needs audio (model.modality text+speech)": (listens, *new, "--out", "o"),
        "missing.csv: cannot be read": (reads, "--csv", "missing.csv", "--out", "o"),
        "empty.csv: no rows": (reads, "--csv", "empty.csv", "--out", "o"),
        "strangers.csv:2: none of the 2 turns can be coded; this one because: speaker 'A' has no role": (
            reads,
            *("--csv", "strangers.csv", "--out", "o"),
        ),
        "F_DUPLICATE: 1 id(s) are used for different utterances; make the ids unique, or remove the wrong rows; F_": (
            reads,
            *("--csv", "twice.csv", "--set", "columns.id=id", "--out", "o"),
        ),
        "new.csv:1: missing column(s) said": (reads, "--csv", "new.csv", "--set", "columns.text=said", "--out", "o"),
        "--set: 1 problem\n  - columns.texxt: unknown key": (
            reads,
            *("--csv", "new.csv", "--set", "columns.texxt=a", "--out", "o"),
        ),
    }
    for message, words in cases.items():
        assert refused(work, "predict", *words).startswith(message), message


def test_a_damaged_export_is_one_error(work: Path, made: Path, tmp_path: Path) -> None:
    for name, content, message in (
        ("speech.safetensors", b"half", "its weights cannot be read"),
        ("labels.json", b"{}", "labels.json: sweep: Field required"),
        ("lora/adapter_model.safetensors", None, "its weights cannot be read"),
    ):
        shutil.rmtree("copy", ignore_errors=True)
        shutil.copytree(made / "text", "copy")
        path = Path("copy") / name
        path.write_bytes(content) if content is not None else path.unlink()
        assert message in refused(work, "predict", "copy", "--csv", "new.csv", "--out", "o"), name


def test_an_exported_folder_may_be_moved_and_its_trial_deleted(work: Path, made: Path) -> None:
    shutil.copytree(made / "text", "moved")
    config = yaml.safe_load(Path("moved/config.yaml").read_text())
    config["data"]["shards"] = "gone"
    Path("moved/config.yaml").write_text(yaml.safe_dump(config))
    assert sweep("predict", "moved", *options(made), "--out", "one").code == 0
    assert sweep("predict", made / "text", *options(made), "--out", "other").code == 0
    assert tree(Path("one")) == tree(Path("other"))
    assert complaint(sweep("predict", "moved", *options(made), "--out", "one")).startswith("--out one: exists already")


def test_each_turn_is_coded_by_the_tasks_of_its_role(here: Path) -> None:
    """Two tasks about different roles; then one about each turn besides."""
    table = annomi(here, sessions=12)
    assert sweep("prepare", "annomi", table, "--set", "max_rejected=1", "--out", "shards").code == 0
    changed = ["--set=data.shards=shards", "--set=model.modality=text", "--set=train.epochs=1"]
    weights = {"client_talk": 1, "therapist_behaviour": 1}
    for name, classify in {"roles": 0, "both": 1}.items():
        tasks = [f"--set=tasks.{task}={weight}" for task, weight in (weights | {"classify": classify}).items()]
        assert sweep("train", "good.yaml", *changed, *tasks, "--out", f"trial-{name}").code == 0
        assert sweep("export", f"trial-{name}", "--out", name).code == 0
        assert sweep("predict", name, "--csv", table, "--format", "annomi", "--out", f"coded-{name}").code == 0
    rows = read(Path("coded-roles/predictions.csv"))
    assert len(rows) == 12 * 7
    task_of = {"client": "client_talk", "therapist": "therapist_behaviour"}
    assert all(row["task"] == task_of[row["speaker"]] for row in rows)
    assert all(bool(row["p_change"]) == (row["speaker"] == "client") for row in rows)
    known = {(row["task"], row["id"]): row for row in evaluated(Path("trial-roles"))}
    compared = [known.get((row["task"], f"{row['session']}/{row['turn']}")) for row in rows]
    assert sum(one is not None for one in compared) == len(known)
    assert all(one is None or one["prediction"] == row["code"] for one, row in zip(compared, rows, strict=True))
    both = read(Path("coded-both/predictions.csv"))
    assert len(both) == 2 * len(rows)
    assert '<span class="note">client_talk</span>' in Path("coded-both/transcript.html").read_text(encoding="utf-8")
    write_table(here / "one.csv", [{"conversation": "s", "speaker": "C", "text": "well"}], HEADER[:1] + HEADER[2:4])
    assert sweep("predict", "roles", "--csv", "one.csv", "--out", "one").code == 0
    assert [row["task"] for row in read(Path("one/predictions.csv"))] == ["client_talk"]


def test_turns_to_come_replies_and_sessions_are_answered_too(here: Path) -> None:
    table = annomi(here, sessions=12)
    assert sweep("prepare", "annomi", table, "--set", "max_rejected=1", "--out", "shards").code == 0
    changed = ["data.shards=shards", "model.modality=text", "train.epochs=4", "model.max_new_tokens=4"]
    weights = ["tasks.classify=0", "tasks.forecast=1", "tasks.response=1", "tasks.quality=1"]
    options = [f"--set={one}" for one in (*changed, *weights)]
    assert sweep("train", "good.yaml", *options, "--out", "trial").code == 0
    assert sweep("export", "trial", "--out", "m").code == 0
    outcome = sweep("predict", "m", "--csv", table, "--format", "annomi", "--out", "coded")
    assert "coded 72 of 84 turns; 12 are listed with the reason; rated 12 sessions" in outcome.out
    rows = read(Path("coded/predictions.csv"))
    said = {(row["task"], "/".join(filter(None, (row["session"], row["turn"])))): row for row in rows if row["task"]}
    known = evaluated(Path("trial"))
    assert {one["task"] for one in known} == {"forecast", "response", "quality"}
    for one in known:
        row = said[one["task"], one["id"]]
        text = one["task"] == "response"
        assert (row["reply"], row["code"]) == ((one["prediction"], "") if text else ("", one["prediction"])), one
        if not text:
            shares = softmax(list(one["scores"].values()))
            assert [float(row[f"p_{label}"]) for label in one["scores"]] == pytest.approx(shares, rel=1e-5)
    first = [row for row in rows if row["turn"] and not row["task"]]
    assert {row["not_coded"] for row in first} == {"no turn comes before it"}
    assert {row["speaker"] for row in rows if row["task"] == "response"} == {"therapist"}
    page = Path("coded/transcript.html").read_text(encoding="utf-8")
    replies = [row["reply"] for row in rows if row["task"] == "response"]
    assert (page.count("session quality: "), page.count(">reply of the model: ")) == (12, len(replies))
    assert any(replies), "the model must say something for this to test anything"


def test_a_model_of_whole_sessions_rates_them(here: Path) -> None:
    changed = ("tasks.classify=0", "tasks.quality=1", "model.modality=text", "train.epochs=1")
    table = annomi(here, sessions=12)
    assert sweep("prepare", "annomi", table, "--set", "max_rejected=1", "--out", "shards").code == 0
    options = [f"--set={one}" for one in ("data.shards=shards", *changed)]
    assert sweep("train", "good.yaml", *options, "--out", "trial").code == 0
    assert sweep("export", "trial", "--out", "m").code == 0
    outcome = sweep("predict", "m", "--csv", table, "--format", "annomi", "--out", "coded")
    assert "coded 0 of 84 turns; 84 are listed with the reason; rated 12 sessions" in outcome.out
    rows = read(Path("coded/predictions.csv"))
    assert {row["not_coded"] for row in rows if row["turn"]} == {"only whole sessions are rated"}
    assert all(float(row["p_high"]) + float(row["p_low"]) == pytest.approx(1) for row in rows if not row["turn"])

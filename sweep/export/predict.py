"""`sweep predict`: an exported model codes new sessions, in this process."""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data.atomic import new_folder, refuse_existing
from data.config import DataConfig
from data.corpus.config import CorpusConfig
from data.errors import MisfitError, UserError
from data.importers import IMPORTERS
from data.loading.examples import clip_samples, read_example
from data.loading.tasks import TASKS, Item, has_sound
from data.preparation.build import Run
from data.preparation.unlabelled import SPLIT, codable, prepare_sessions, read_sessions, why_not
from data.preparation.validate import Aligner
from data.report.summary import read_findings
from data.report.transcript import Coding, codings_csv, transcript_html
from data.shards.dataset import Shards
from model.checkpoints import peft_export as exported
from model.checkpoints.checkpoint import CheckpointError
from model.evaluation.evaluator import evaluate
from model.evaluation.metrics import Record
from model.evaluation.split_data import Select, TrialData
from model.speech_llm.speech_llm import SpeechLLM
from sweep.config.files import load
from sweep.config.resolve import ResolvedConfig, resolve
from sweep.execution.trial import available_device, settle

TABLE, PAGE = "predictions.csv", "transcript.html"


def predict_sessions(
    folder: Path,
    source: Path,
    audio: Path | None,
    kind: str,
    settings: CorpusConfig,
    out: Path,
    *,
    align: Aligner | None,
    run: Run,
    say: Callable[[str], object],
) -> list[Coding]:
    """Code new sessions by all tasks of a model and write what came out.

    Args:
        folder: of the exported model.
        source: the sessions, a file or a folder.
        audio: folder with the recordings; None: text only.
        kind: of IMPORTERS.
        settings: how the sessions are read, as of a corpus.
        out: gets TABLE and PAGE; is written whole or not at all.
        align, run: refine the times of turns, and make the shards.
        say: told what is done.

    Returns:
        Every turn of the sessions, coded or with the reason why not; and every session, where sessions are rated.

    Raises:
        UserError: `out` exists, the folder holds no model, or there is nothing that it can be asked about.
    """
    _refuse(kind, out)
    said = exported.read(folder)
    say(f"reading {source}")
    corpus = read_sessions(kind, source, audio, settings, _roles(said), _qualities(said))
    with tempfile.TemporaryDirectory() as place:
        shards = prepare_sessions(corpus, Path(place) / "shards", settings, align, run)
        say("coding")
        codings = _code(folder, said, shards)
        _write(out, codings, said, shards)
    return codings


def _refuse(kind: str, out: Path) -> None:
    refuse_existing(out)
    if kind not in IMPORTERS:
        raise UserError(f"--format {kind}: no such format; use one of {', '.join(IMPORTERS)}")


def _write(out: Path, codings: Sequence[Coding], said: exported.Exported, shards: Shards) -> None:
    title = said.sweep + ("" if said.trial is None else f", trial {said.trial}")
    with new_folder(out) as unfinished:
        (unfinished / TABLE).write_text(codings_csv(codings), encoding="utf-8", newline="")
        page = transcript_html(codings, title, shards)
        (unfinished / PAGE).write_text(page, encoding="utf-8")


def _roles(said: exported.Exported) -> dict[str, tuple[str, ...]]:
    """Who may carry which label, as far as the model's tasks go."""
    wanted = {TASKS[name].role for name in said.tasks if TASKS[name].answer == "label"}
    return {role: labels if wanted & {None, role} else () for role, labels in said.roles.items()}


def _qualities(said: exported.Exported) -> Sequence[str]:
    return said.tasks["quality"].labels if "quality" in said.tasks else ()


def _code(folder: Path, said: exported.Exported, shards: Shards) -> list[Coding]:
    config = _config(folder, shards)
    hears, tasks = config.model.uses_audio, list(said.tasks)
    if hears and not has_sound(shards):
        raise UserError(
            f"{folder}: the model listens (model.modality {config.model.modality}), and these sessions have no sound: "
            "give the folder of recordings with --audio, and times that lie in them"
        )
    ids = shards.columns["id"]
    reasons = {ids[row]: why for row, why in why_not(shards, read_findings(shards), tasks, hears).items()}
    if not any(codable(shards, name, hears) for name in tasks):
        raise _none(shards, reasons)
    settle(config)
    try:
        model = SpeechLLM(config.model, said.answer_sets(), available_device())
    except CheckpointError as error:
        raise UserError(str(error).removeprefix("model.init_from: ")) from None
    data = TrialData.open(shards, model, config.data, (SPLIT,), select=_fitting(model, config.data, reasons))
    if not data.splits[SPLIT].items:
        raise _none(shards, reasons)
    records = evaluate(model, data, SPLIT, config.train.token_budget)
    return codings(shards, records, {name: own.labels for name, own in said.tasks.items()}, reasons)


def _none(shards: Shards, reasons: Mapping[str, str]) -> UserError:
    columns = shards.columns
    row = next((row for row, name in enumerate(columns["id"]) if name in reasons), 0)
    why = reasons.get(columns["id"][row], "no turn has a recording")
    return UserError(
        f"{columns['where'][row]}: none of the {len(columns['id'])} turns can be coded; this one because: {why}"
    )


def _config(folder: Path, shards: Shards) -> ResolvedConfig:
    """That of the trial, whose weights now come from the exported files, and whose corpus are these sessions."""
    config = load(str(folder / "config.yaml"))
    spoken = set(shards.columns["speaker"])
    roles = {role: name for role, name in config.model.prompt.roles.items() if role in spoken}
    return resolve(
        config.with_values(
            {
                "data.shards": str(shards.folder),
                "data.fold": 0,
                "model.init_from": str(folder),
                "model.init_partial": False,
                "model.adapter.init_from": None,
                "model.prompt.roles": roles,
            }
        )
    )


def _fitting(model: SpeechLLM, config: DataConfig, reasons: dict[str, str]) -> Select:
    """Chooses the items that the model has room for, and notes the reasons of the others, by id."""

    def select(shards: Shards, name: str, split: str) -> list[Item]:
        found = []
        for item in codable(shards, name, model.config.uses_audio):
            example = read_example(shards, item, config, sound=False)
            try:
                model.measure(example, clip_samples(shards, item, config))
                found.append(item)
            except MisfitError as error:
                reasons.setdefault(example.id, str(error))
        return found

    return select


def codings(
    shards: Shards, records: Sequence[Record], labels: Mapping[str, Sequence[str]], reasons: Mapping[str, str]
) -> list[Coding]:
    """Every turn with what the model said about it, or why it said nothing; before them, what it said of their session.

    Args:
        shards: of the sessions.
        records: of the evaluation.
        labels: by task; none where its answer is a text.
        reasons: by id, of turns and sessions without a record.

    Returns:
        In the order of the index; a turn that several tasks are about comes once for each.
    """
    said: dict[str, list[Record]] = {}
    for record in records:
        said.setdefault(record.id, []).append(record)
    found: list[Coding] = []
    for row, name in enumerate(shards.columns["id"]):
        turn, rows = _turn(shards, row), shards.sessions[row]
        if row == rows[0] and "quality" in labels:
            whole = Coding(rows[-1], turn.session, "", "", None, None, "", task="quality")
            found += _coded(whole, said, turn.session, labels, {turn.session: "no turn has a recording", **reasons})
        found += _coded(turn, said, name, labels, reasons)
    return found


def _coded(
    plain: Coding,
    said: Mapping[str, Sequence[Record]],
    name: str,
    labels: Mapping[str, Sequence[str]],
    reasons: Mapping[str, str],
) -> Iterator[Coding]:
    """A turn or a session by its id, once for each task."""
    if name not in said:
        yield replace(plain, reason=reasons[name])
    for record in said.get(name, []):
        if known := labels[record.task]:
            shares = dict(zip(known, softmax(record.scores), strict=True))
            yield replace(plain, task=record.task, code=record.prediction, shares=shares)
        else:
            yield replace(plain, task=record.task, reply=record.prediction)


def _turn(shards: Shards, row: int) -> Coding:
    columns = {name: values[row] for name, values in shards.columns.items()}
    session = columns["conversation"]
    return Coding(
        row=row,
        session=session,
        turn=columns["id"].removeprefix(f"{session}/"),
        speaker=columns["speaker"],
        start=columns["t_start"],
        end=columns["t_end"],
        text=columns["text"],
    )


def softmax(scores: Sequence[float]) -> list[float]:
    """Log-probabilities of label strings → shares of the labels, which sum to 1."""
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]

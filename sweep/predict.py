"""`sweep predict`: an exported model codes new sessions, in this process."""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data.coding import SPLIT, codable, prepare_sessions, read_sessions, why_not
from data.config import DataConfig
from data.corpus_config import CorpusConfig
from data.errors import MisfitError, UserError
from data.examples import clip_samples, read_example
from data.importers import IMPORTERS
from data.prepare import Run
from data.report.summary import read_findings
from data.report.transcript import Coding, codings_csv, transcript_html
from data.shards import Shards
from data.tasks import TASKS, Item, has_sound
from data.validate import Aligner
from model import exported
from model.checkpoint import CheckpointError
from model.evaluate import Select, TrialData, evaluate
from model.metrics import Record
from model.speech_llm import SpeechLLM
from sweep import builtin
from sweep import config as configuration
from sweep.config import Config
from sweep.trial import available_device, settle
from sweep.whole import refuse_taken, whole_folder

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
    """Code new sessions and write what came out.

    Args:
        folder: of the exported model.
        source: the sessions, a file or a folder.
        audio: folder with the recordings; None: text only.
        kind: of IMPORTERS.
        settings: how the sessions are read, as of a corpus.
        out: gets TABLE and PAGE; is written whole or not at all.
        align: refines the times of turns.
        run: makes the shards.
        say: told what is done.

    Returns:
        Every turn of the sessions, coded or with the reason why not.

    Raises:
        UserError: `out` exists, the folder holds no model that codes turns, or none of the turns can be coded.
    """
    refuse_taken(out)
    if kind not in IMPORTERS:
        raise UserError(f"--format {kind}: no such format; use one of {', '.join(IMPORTERS)}")
    said = exported.read(folder)
    tasks = _tasks(folder, said)
    say(f"reading {source}")
    corpus = read_sessions(kind, source, audio, settings, _roles(said, tasks))
    with tempfile.TemporaryDirectory() as place:
        shards = prepare_sessions(corpus, Path(place) / "shards", settings, align, run)
        say("coding")
        codings = _code(folder, said, tasks, shards)
        title = said.sweep + ("" if said.trial is None else f", trial {said.trial}")
        with whole_folder(out) as unfinished:
            (unfinished / TABLE).write_text(codings_csv(codings), encoding="utf-8", newline="")
            page = transcript_html(codings, title, shards)
            (unfinished / PAGE).write_text(page, encoding="utf-8")
    return codings


def _tasks(folder: Path, said: exported.Exported) -> list[str]:
    """Those whose item is a turn that is read, and whose answer is its label."""
    found = [name for name in said.tasks if TASKS[name].answer == "label" and TASKS[name].reads == "turn"]
    if not found:
        raise UserError(
            f"{folder}: its tasks ({', '.join(said.tasks)}) code no turn that is read; export a trial of tasks.classify"
        )
    return found


def _roles(said: exported.Exported, tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Who may carry which label, as far as these tasks go."""
    wanted = {TASKS[name].role for name in tasks}
    return {role: labels if wanted & {None, role} else () for role, labels in said.roles.items()}


def _code(folder: Path, said: exported.Exported, tasks: Sequence[str], shards: Shards) -> list[Coding]:
    config = _config(folder, shards)
    hears = config.model.hears
    if hears and not has_sound(shards):
        raise UserError(
            f"{folder}: the model listens (model.modality {config.model.modality}), and these sessions have no sound: "
            "give the folder of recordings with --audio, and times that lie in them"
        )
    reasons = why_not(shards, read_findings(shards), hears)
    _refuse_none(shards, reasons)
    settle(config)
    try:
        model = SpeechLLM(config.model, {name: said.answer_sets()[name] for name in tasks}, available_device())
    except CheckpointError as error:
        raise UserError(str(error).removeprefix("model.init_from: ")) from None
    data = TrialData.open(shards, model, config.data, (SPLIT,), select=_fitting(model, config.data, reasons))
    if not data.splits[SPLIT].items:
        _refuse_none(shards, reasons)
    records = evaluate(model, data, SPLIT, config.train.token_budget)
    return codings(shards, records, {name: said.tasks[name].labels for name in tasks}, reasons)


def _refuse_none(shards: Shards, reasons: Mapping[int, str]) -> None:
    if len(reasons) == len(shards.columns["id"]):
        row = min(reasons)
        raise UserError(
            f"{shards.columns['where'][row]}: none of the {len(reasons)} turns can be coded; this one because: "
            f"{reasons[row]}"
        )


def _config(folder: Path, shards: Shards) -> Config:
    """That of the trial, whose weights now come from the exported files, and whose corpus are these sessions."""
    config = configuration.load(str(folder / "config.yaml"))
    spoken = set(shards.columns["speaker"])
    roles = {role: name for role, name in config.model.prompt.roles.items() if role in spoken}
    return builtin.resolve(
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


def _fitting(model: SpeechLLM, config: DataConfig, reasons: dict[int, str]) -> Select:
    """Chooses the items that the model has room for, and notes the reasons of the others."""

    def select(shards: Shards, name: str, split: str) -> list[Item]:
        found = []
        for item in codable(shards, name, model.config.hears):
            try:
                model.measure(read_example(shards, item, config, sound=False), clip_samples(shards, item, config))
                found.append(item)
            except MisfitError as error:
                reasons[item[1]] = str(error)
        return found

    return select


def codings(
    shards: Shards, records: Sequence[Record], labels: Mapping[str, Sequence[str]], reasons: Mapping[int, str]
) -> list[Coding]:
    """Every turn with what the model said about it, or why it said nothing.

    Args:
        shards: of the sessions.
        records: of the evaluation.
        labels: by task.
        reasons: by row, of turns without a record.

    Returns:
        In the order of the index; a turn that several tasks are about comes once for each.
    """
    said: dict[str, list[Record]] = {}
    for record in records:
        said.setdefault(record.id, []).append(record)
    found = []
    for row, name in enumerate(shards.columns["id"]):
        turn = _turn(shards, row)
        if name not in said:
            found.append(replace(turn, reason=reasons[row]))
        for record in said.get(name, []):
            shares = dict(zip(labels[record.task], softmax(record.scores), strict=True))
            found.append(replace(turn, task=record.task, code=record.prediction, shares=shares))
    return found


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

"""`sweep predict`: code new sessions with an exported model, in this process."""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data.atomic import new_folder, refuse_existing
from data.config import DataConfig
from data.corpus.config import CorpusConfig
from data.errors import MisfitError, UserError
from data.importers import IMPORTERS, guess_format
from data.loading.examples import clip_samples, read_example
from data.loading.tasks import TASKS, Item, has_audio
from data.preparation.build import Run
from data.preparation.unlabelled import SPLIT, codable_items, prepare_sessions, read_sessions, reasons_not_coded
from data.preparation.validate import Aligner
from data.report.summary import read_findings
from data.report.transcript import Coding, codings_csv, transcript_html
from data.shards.dataset import Shards
from model.checkpoints import peft_export
from model.checkpoints.checkpoint import CheckpointError
from model.checkpoints.fingerprint import identify_bases, refuse_other_bases
from model.evaluation.evaluator import evaluate
from model.evaluation.llm_check import resolve_packing
from model.evaluation.metrics import Record
from model.evaluation.split_data import Select, TrialData
from model.speech_llm.packing import set_packing
from model.speech_llm.speech_llm import SpeechLLM
from sweep.config.files import load
from sweep.config.resolve import ResolvedConfig, resolve
from sweep.execution.trial import available_device, configure_process

TABLE, PAGE = "predictions.csv", "transcript.html"
_MOST_REASONS = 5  # in one message; the table lists the reason of every turn


def predict_sessions(
    folder: Path,
    source: Path,
    audio: Path | None,
    kind: str | None,
    settings: CorpusConfig,
    out: Path,
    *,
    align: Aligner | None,
    run: Run,
    say: Callable[[str], object],
    allow_other_base: bool = False,
) -> list[Coding]:
    """Code new sessions by all tasks of a model and write the codings as a table and a page.

    Args:
        folder: of the exported model.
        source: the sessions, a file or a folder.
        audio: folder with the recordings; None: text only.
        kind: the format of the sessions, of IMPORTERS; None: guessed from `source`.
        settings: how the sessions are read, as for a corpus.
        out: the new folder, with TABLE and PAGE; it is complete, or does not exist.
        align: refines the times of turns.
        run: runs the jobs that write shards.
        say: prints a line of progress.
        allow_other_base: accept a base model that is not the one that the model was trained on.

    Returns:
        Every turn of the sessions, coded or with the reason why not; and every session, where sessions are rated.

    Raises:
        UserError: `out` exists, the folder holds no model, a base model has changed, or no turn or session can be
            coded.
    """
    refuse_existing(out)
    if kind is None:
        kind = guess_format(source)
        say(f"format: {kind} ({IMPORTERS[kind].description}) guessed; choose another one with --format")
    if kind not in IMPORTERS:
        raise UserError(f"--format {kind}: no such format; use one of {', '.join(IMPORTERS)}")
    exported = peft_export.read(folder)
    if not allow_other_base:  # before anything is computed
        bases = identify_bases(resolve(load(str(folder / "config.yaml"))).model)
        refuse_other_bases(str(folder), exported.bases, bases)
    say(f"reading {source}")
    coded_roles = {TASKS[name].role for name in exported.tasks if TASKS[name].answer == "label"}
    roles = {role: labels if coded_roles & {None, role} else () for role, labels in exported.roles.items()}
    qualities = exported.tasks["quality"].labels if "quality" in exported.tasks else ()
    corpus = read_sessions(kind, source, audio, settings, roles, qualities)
    title = exported.sweep + ("" if exported.trial is None else f", trial {exported.trial}")
    with tempfile.TemporaryDirectory() as temporary:
        shards = prepare_sessions(corpus, Path(temporary) / "shards", settings, align, run)
        say("coding")
        codings = _code(folder, exported, shards, audio, allow_other_base)
        with new_folder(out) as unfinished:
            (unfinished / TABLE).write_text(codings_csv(codings), encoding="utf-8", newline="")
            (unfinished / PAGE).write_text(transcript_html(codings, title, shards), encoding="utf-8")
    return codings


def _code(
    folder: Path, exported: peft_export.Exported, shards: Shards, audio: Path | None, allow_other_base: bool
) -> list[Coding]:
    """Code what the model can code, and give the reason for every other turn."""
    config = _config(folder, shards)
    uses_audio, tasks = config.model.uses_audio, list(exported.tasks)
    if uses_audio and audio is None and not has_audio(shards):
        raise UserError(
            f"{folder}: the model needs audio (model.modality {config.model.modality}), and these sessions have none; "
            "give the folder of recordings with --audio, and times within them"
        )
    ids = shards.columns["id"]
    reasons = {
        ids[row]: why for row, why in reasons_not_coded(shards, read_findings(shards), tasks, uses_audio).items()
    }
    if not any(codable_items(shards, name, uses_audio) for name in tasks):
        raise _nothing_to_code(shards, reasons)
    configure_process(config)
    try:
        model = SpeechLLM(config.model, exported.answer_sets(), available_device(), allow_other_base=allow_other_base)
    except CheckpointError as error:
        raise UserError(str(error).removeprefix("model.init_from: ")) from None
    set_packing(model.llm, resolve_packing(config.model, config.train.packing, available_device()))
    data = TrialData.open(shards, model, config.data, (SPLIT,), select=_fitting(model, config.data, reasons))
    if not data.splits[SPLIT].items:
        raise _nothing_to_code(shards, reasons)
    records = evaluate(model, data, SPLIT, config.train.initial_token_budget)
    return codings(shards, records, {name: answers.labels for name, answers in exported.tasks.items()}, reasons)


def _nothing_to_code(shards: Shards, reasons: Mapping[str, str]) -> UserError:
    """Return an error with every reason, how many turns have it, and where the first of them is."""
    columns = shards.columns
    places: dict[str, list[str]] = {}
    for row, name in enumerate(columns["id"]):
        places.setdefault(reasons.get(name, "no turn has a recording"), []).append(columns["where"][row])
    first = next(iter(places.values()))[0]
    if len(places) == 1:
        why = f"this one because: {next(iter(places))}"
    else:
        ranked = sorted(places.items(), key=lambda item: -len(item[1]))
        counted = [f"{len(wheres)} x {reason} ({wheres[0]})" for reason, wheres in ranked[:_MOST_REASONS]]
        more = f" and {len(ranked) - _MOST_REASONS} more reasons" if len(ranked) > _MOST_REASONS else ""
        why = "; ".join(counted) + more
    return UserError(f"{first}: none of the {len(columns['id'])} turns can be coded; {why}")


def _config(folder: Path, shards: Shards) -> ResolvedConfig:
    """Return the trial's configuration with the exported weights, and these sessions as its corpus."""
    config = load(str(folder / "config.yaml"))
    spoken = set(shards.columns["speaker"])
    roles = {role: name for role, name in config.model.prompt.roles.items() if role in spoken}
    return resolve(
        config.with_values(
            {
                "data.shards": str(shards.folder),
                "data.fold": 0,
                "data.codes": None,
                "model.init_from": str(folder),
                "model.init_partial": False,
                "model.adapter.init_from": None,
                "model.lora.init_from": None,
                "model.prompt.roles": roles,
            }
        )
    )


def _fitting(model: SpeechLLM, config: DataConfig, reasons: dict[str, str]) -> Select:
    """Return a function that selects the items which fit into the model, and adds the others' reasons by id."""

    def select(shards: Shards, name: str, split: str) -> list[Item]:
        fitting = []
        for item in codable_items(shards, name, model.config.uses_audio):
            example = read_example(shards, item, config, with_audio=False)
            try:
                model.measure(example, clip_samples(shards, item, config))
                fitting.append(item)
            except MisfitError as error:
                reasons.setdefault(example.id, str(error))
        return fitting

    return select


def codings(
    shards: Shards, records: Sequence[Record], labels: Mapping[str, Sequence[str]], reasons: Mapping[str, str]
) -> list[Coding]:
    """Return every turn with its coding, or the reason why it has none; before them, the rating of their session.

    Args:
        shards: of the sessions.
        records: of the evaluation.
        labels: by task; empty where its answer is a text.
        reasons: by id, of turns and sessions without a record.

    Returns:
        Codings in the order of the index; a turn that several tasks code comes once for each task.
    """
    by_id: dict[str, list[Record]] = {}
    for record in records:
        by_id.setdefault(record.id, []).append(record)
    coded: list[Coding] = []
    for row, turn_id in enumerate(shards.columns["id"]):
        turn, rows = _turn(shards, row), shards.sessions[row]
        if row == rows[0] and "quality" in labels:
            session = Coding(rows[-1], turn.session, "", "", None, None, "", task="quality")
            session_reasons = {turn.session: "no turn has a recording", **reasons}
            coded += _coded(session, by_id, turn.session, labels, session_reasons)
        coded += _coded(turn, by_id, turn_id, labels, reasons)
    return coded


def _coded(
    plain: Coding,
    by_id: Mapping[str, Sequence[Record]],
    item_id: str,
    labels: Mapping[str, Sequence[str]],
    reasons: Mapping[str, str],
) -> Iterator[Coding]:
    """Yield a turn or a session once for each task that codes it, or once with the reason why none does."""
    if item_id not in by_id:
        yield replace(plain, reason=reasons[item_id])
    for record in by_id.get(item_id, []):
        if task_labels := labels[record.task]:
            shares = dict(zip(task_labels, softmax(record.scores), strict=True))
            yield replace(plain, task=record.task, code=record.prediction, probabilities=shares)
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
    """Turn log-probabilities of label strings into shares of the labels, which sum to 1."""
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]

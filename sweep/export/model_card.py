"""The model card of an exported trial: what it is, how good it is, what it is for, and how to reproduce it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data.formats import format_count, format_list
from data.loading.tasks import TASKS
from model.checkpoints.audio_llms import audio_family
from model.checkpoints.base_files import has_bundled_adapter, local_folder
from model.checkpoints.fingerprint import Bases
from model.evaluation.ceiling import Ceiling
from model.evaluation.metrics import Record
from model.parts import part_of, summarise_parts
from model.speech_llm.speech_llm import SpeechLLM
from sweep.analysis.predictions import Predictions, interval_of
from sweep.analysis.view import Column, TableView, to_markdown
from sweep.config.schema import Config
from sweep.export.merged_lines import merged_lines

NO_QUALITY = ("train_loss", "seconds", "data_wait")  # what a trial reports beside figures of quality
TURN = {"text": "as text", "speech": "as audio", "text+speech": "as text and as audio"}
PREDICTS = {
    "classify": "the code of a turn",
    "client_talk": "the code of a client's turn",
    "therapist_behaviour": "the code of a therapist's turn",
    "forecast": "the code of the next turn",
    "response": "the therapist's next turn",
    "quality": "the quality of a session",
}
STORED = {  # how the weights of the LLM's linear layers were stored in training
    "none": "",
    "8bit": ", quantized to 8 bits (bitsandbytes, one scale for each row)",
    "4bit": ", quantized to 4 bits (bitsandbytes, NF4 with double quantization)",
}
CONTROLS = {
    "zeroed": "all clips were silenced",
    "shuffled": "every clip was replaced by that of another utterance",
    "noisy": "white noise was added to all clips at {snr_db:g} dB",
}


@dataclass(frozen=True)
class CardFacts:
    """What the card says about a trial and its corpus."""

    sweep: str
    trial: int | None  # None: it was trained alone
    corpus: str
    fingerprint: str  # of the corpus
    roles: Mapping[str, Sequence[str]]  # the labels that each role may carry
    code: str  # version that trained it
    epoch: int  # of the last evaluation on the validation split
    metrics: Mapping[str, object]  # of that evaluation
    predictions: Predictions  # of that evaluation
    confirmed: Sequence[str]  # the results of `sweep confirm`; empty: it was not confirmed
    bases: Bases  # the models that it was trained on, by setting
    bases_are_recorded: bool  # by its training; otherwise those that were there at the export
    ceilings: Sequence[Ceiling] = ()  # of the tasks whose validation items have several annotators
    classes: str = ""  # the codes that each label merges, if `data.codes` is set


def model_card(model: SpeechLLM, config: Config, facts: CardFacts, merged: bool = False) -> str:
    """Return the card in Markdown.

    Args:
        model: the exported model.
        config: of its trial.
        facts: about the trial.
        merged: whether the folder has all weights, see `write_merged`.
    """
    title = facts.sweep + ("" if facts.trial is None else f", trial {facts.trial}")
    return "\n".join(
        [
            f"# {title}",
            "",
            _reads(config),
            "",
            *to_markdown(_facts(model, config, facts)),
            "",
            *_figures(config, facts),
            "",
            "## Use and limits",
            "",
            _limits(config, facts),
            "",
            *(_loading(model, config) if merged else _commands(model, config)),
        ]
    )


def _reads(config: Config) -> str:
    """Return what the model predicts and what it reads for that."""
    model, tasks = config.model, config.tasks.active()
    kind = "speech LLM" if model.uses_audio else "text LLM, which reads no audio,"
    sentences = [f"A {kind} for counselling dialogues.", f"It predicts {format_list([PREDICTS[t] for t in tasks])}."]
    limit = model.prompt.history_tokens
    history = 0 if limit == 0 else config.data.history
    fitting = "" if limit is None or history == 0 else f", as far as they fit into {limit} tokens"
    before, last = format_count(history, "turn"), format_count(history + 1, "turn")
    how = "as text"
    if model.uses_audio:
        how = f"or back to the last one that has audio: that one {TURN[model.modality]}, the others as text"
    if any(TASKS[task].answer == "label" and TASKS[task].reads == "turn" for task in tasks):
        rest = f"up to {before} before it as text{fitting}" if history else "no turn before it"
        sentences.append(f"It reads the turn {TURN[model.modality]}, and {rest}.")
    if any(TASKS[task].reads == "before" for task in tasks):
        sentences.append(f"Of what comes next it reads nothing, only up to {last} before it, {how}{fitting}.")
    if "quality" in tasks:
        sentences.append(f"Of a session it reads up to {last} at the end, {how}{fitting}.")
    controls = [CONTROLS[config.data.sound].format(snr_db=config.data.snr_db)] if _changes_sound(config) else []
    if config.data.last_text == "omitted" and "text" in model.modality:
        controls.append("the text of " + ("the audio turn" if model.uses_audio else "the last turn") + " was left out")
    if controls:
        sentences.append(f"It is a control experiment: {format_list(controls)}.")
    return " ".join(sentences)


def _changes_sound(config: Config) -> bool:
    return config.model.uses_audio and config.data.sound in CONTROLS


def _limits(config: Config, facts: CardFacts) -> str:
    """Return what the model is for, and what is not known about it."""
    answers = {TASKS[task].answer for task in config.tasks.active()}
    uses = {
        "label": "as a first coding that a trained coder checks on a sample before anything is concluded from it",
        "quality": "as a first rating of sessions that a trained rater checks on a sample",
        "text": "as a source of draft replies, none of which reaches a client unread",
    }
    purpose = format_list([use for answer, use in uses.items() if answer in answers])
    origin = "Its figures come from the validation split"
    if facts.trial is not None:
        origin += ", which also chose among the trials and therefore flatters it"
    else:
        origin += ", which flatters it if its settings were chosen there"
    known = f"{origin}; other" if facts.predictions else "It was not evaluated; other"
    return (
        f"It is meant for research on counselling dialogues that resemble the corpus it was trained on, {purpose}. "
        f"{known} languages, recordings, populations and code books were not tested, and it must not be used to judge "
        "individual clients or counsellors."
    )


def _facts(model: SpeechLLM, config: Config, facts: CardFacts) -> TableView:
    trained = [
        f"{part.name} ({part.trained:,} parameters)" for part in summarise_parts(model, model.sources) if part.trained
    ]
    tasks = [f"{task}: {', '.join(answers.labels) or 'a text'}" for task, answers in model.tasks.items()]
    adapted = f", with LoRA of rank {rank}" if (rank := config.model.encoder.lora.rank) else ""
    state = _state(model, "encoder") + adapted
    encoder = f"that of the LLM, {state}"
    if config.model.encoder.path is not None:
        encoder = f"`{config.model.encoder.path}`, {state}{_digest(facts, 'model.encoder.path')}"
    rows = {
        "sweep": facts.sweep,
        "trial": "trained alone" if facts.trial is None else str(facts.trial),
        "seed": str(config.seed),
        "corpus": f"{facts.corpus}, fingerprint `{facts.fingerprint}`",
        "code version": f"`{facts.code}`",
        "LLM": f"`{config.model.llm.path}`, {_llm_state(model)}{_digest(facts, 'model.llm.path')}",
        "speech encoder": encoder if model.encoder else "",
        "trained parts": ", ".join(trained),
        "started from": ", ".join(f"`{path}`" for path in _starts(config).values() if path),
        "tasks and labels": "; ".join(tasks),
        "codes of the labels": facts.classes,
    }
    return TableView([Column(""), Column("")], [[name, value] for name, value in rows.items() if value])


def _state(model: SpeechLLM, part: str) -> str:
    """Return whether the weights of a part are those that were published."""
    if part in model.trained_parts:
        return "trained"
    loaded = any(part_of(name) == part for name in model.loaded)
    return "with weights of an earlier trial" if loaded else "frozen"


def _llm_state(model: SpeechLLM) -> str:
    lora, stored = model.config.lora, STORED[model.config.llm.load_in]
    if not lora.enabled:
        return f"{_state(model, 'llm')}{stored}"
    targets = "all linear layers" if lora.targets == "all-linear" else ", ".join(lora.targets)
    return f"{_state(model, 'llm')}{stored}, with LoRA of rank {lora.rank} on {targets}"


def _digest(facts: CardFacts, setting: str) -> str:
    """Return the digest of a base model, where it is known."""
    if (base := facts.bases.get(setting)) is None:
        return ""
    revision = "" if base.revision is None else f", revision `{base.revision}`"
    return f", digest `{base.digest}`{revision}" + ("" if facts.bases_are_recorded else " (at the export)")


def _figures(config: Config, facts: CardFacts) -> list[str]:
    counts = "; ".join(f"{task}: {_size(records)}" for task, (_, records) in facts.predictions.items())
    rows = []
    for name, value in facts.metrics.items():
        if isinstance(value, float) and not name.startswith(NO_QUALITY):
            interval = interval_of(facts.predictions, name, facts.roles)
            limits = "" if interval is None or interval.low is None else f"{interval.low:.3f} to {interval.high:.3f}"
            rows.append([name, f"{value:.4g}", limits])
    lines = ["## Figures", ""]
    if facts.predictions:
        lines += [f"On the validation split, after epoch {facts.epoch} of {config.train.epochs}. {counts}.", ""]
        lines += to_markdown(TableView(list(map(Column, ("metric", "value", "95 % interval by session"))), rows))
    else:
        lines.append("It was not evaluated.")
    records = [record for _, of_task in facts.predictions.values() for record in of_task]
    human = [line for ceiling in facts.ceilings for line in ceiling.lines(records)]
    if human:
        lines += ["", "Beside annotators:", "", *(f"- {line}" for line in human)]
    if facts.confirmed:
        lines += ["", "Under fresh seeds:", "", *(f"- {line}" for line in facts.confirmed)]
    return lines


def _size(records: Sequence[Record]) -> str:
    sessions = len({record.conversation for record in records})
    return f"{len(records)} items of {format_count(sessions, 'session')}"


def _loading(model: SpeechLLM, config: Config) -> list[str]:
    """Return how a merged model is loaded and scored."""
    lora = "LoRA is merged into the weights of the LLM. " if model.config.lora.enabled else ""
    if model.config.llm.load_in != "none":
        lora += f"Its linear layers hold the quantized weights that it was trained on, as {model.config.llm.dtype}. "
    exact = model.config.precision == "float32" and config.model.llm.dtype == "float32"
    equal = (
        "equal those of the sweep to a relative 1e-4"
        if exact
        else "differ from those of the sweep by roundings of bfloat16"
    )
    return [
        "## Loading",
        "",
        f"This folder holds all weights. {lora}Plain transformers loads it, and the scores {equal}. Other dialogues "
        "are written piece by piece, too:",
        "",
        "```python",
        *merged_lines(model),
        "```",
    ]


def _commands(model: SpeechLLM, config: Config) -> list[str]:
    audio = " --audio recordings" if model.config.uses_audio else ""
    verb = "write replies for" if config.tasks.active() == ["response"] else "code"
    lines = ["## Commands", "", f"Run these in this folder. To {verb} new sessions:", ""]
    lines += ["```bash", f"sweep predict . --csv sessions.csv{audio} --out coded", "```", ""]
    earlier = [f"`{key}`" for key, value in _starts(config).items() if value]
    named = format_list(["the corpus", "the base models", *(f"the weights of {key}" for key in earlier)])
    lines += [f"To train it again from {named} that `config.yaml` names:", ""]
    lines += ["```bash", "sweep train config.yaml --out again", "```", ""]
    base = local_folder(model.config.llm.path)
    if base is not None and has_bundled_adapter(base):
        lines += [
            "PEFT cannot load the LoRA weights alone on this base model: they would take the place of the adapter that "
            "is published with it. `sweep export --merged` writes both in one model.",
            "",
        ]
    elif "lora" in model.trained_parts or any("lora_" in name for name in model.loaded):
        rest = ", without the weights of the LLM itself that differ from it (`speech.safetensors`)"
        lines += [f"To load the LoRA weights alone in Python{rest if _state(model, 'llm') != 'frozen' else ''}:", ""]
        lines += ["```python"]
        own = audio_family(model.config.llm.path) is not None
        kind = "AutoModelForMultimodalLM" if own else "AutoModelForCausalLM"
        llm = model.config.llm
        quantized, options = llm.load_in != "none", list[str]()
        if quantized:
            bits, kinds = llm.load_in[0], 'bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True'
            settings = f"load_in_{bits}bit=True{f', {kinds}' if bits == '4' else ''}"
            options = [f"stored = BitsAndBytesConfig({settings})"]
        lines += [
            "from peft import PeftModel",
            f"from transformers import {kind}{', BitsAndBytesConfig' if quantized else ''}",
            "",
            *options,
            f"base = {kind}.from_pretrained({llm.path!r}{', quantization_config=stored' if quantized else ''})",
            'llm = PeftModel.from_pretrained(base, "lora")',
            "```",
            "",
        ]
    return lines


def _starts(config: Config) -> dict[str, str | None]:
    """Return the settings that name files of earlier weights."""
    return {
        "model.init_from": config.model.init_from,
        "model.adapter.init_from": config.model.adapter.init_from if config.model.uses_audio else None,
        "model.lora.init_from": config.model.lora.init_from,
    }

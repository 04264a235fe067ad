"""The model card of an exported trial: what it is, how good it is, what it is for, and how to reproduce it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data.formats import format_count
from model.evaluation.metrics import Record
from model.parts import summarise_parts
from model.speech_llm.speech_llm import SpeechLLM
from sweep.analysis.predictions import Predictions, interval_of
from sweep.analysis.view import Column, TableView, to_markdown
from sweep.config.schema import Config

LIMITS = """\
It is meant for research on counselling dialogues that resemble the corpus it was trained on, as a first coding that a
trained coder checks on a sample before anything is concluded from it. Its figures come from the validation split, which
also chose among the trials and therefore flatters it; other languages, recordings, populations and code books were not
tested, and it must not be used to judge individual clients or counsellors."""
NO_QUALITY = ("train_loss", "seconds", "data_wait")  # what a trial reports beside figures of quality
TURN = {"text": "as text", "speech": "as audio", "text+speech": "as text and as audio"}


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


def model_card(model: SpeechLLM, config: Config, facts: CardFacts) -> str:
    """Return the card in Markdown.

    Args:
        model: the exported model.
        config: of its trial.
        facts: about the trial.
    """
    title = facts.sweep + ("" if facts.trial is None else f", trial {facts.trial}")
    turn = TURN[config.model.modality]
    return "\n".join(
        [
            f"# {title}",
            "",
            f"A speech LLM for counselling dialogues. It reads the turns before a turn as text, and the turn {turn}.",
            "",
            *to_markdown(_facts(model, config, facts)),
            "",
            *_figures(config, facts),
            "",
            "## Use and limits",
            "",
            LIMITS,
            "",
            *_commands(model),
        ]
    )


def _facts(model: SpeechLLM, config: Config, facts: CardFacts) -> TableView:
    trained = [
        f"{part.name} ({part.trained:,} parameters)" for part in summarise_parts(model, model.sources) if part.trained
    ]
    tasks = [f"{task}: {', '.join(answers.labels) or 'a text'}" for task, answers in model.tasks.items()]
    rows = {
        "sweep": facts.sweep,
        "trial": "trained alone" if facts.trial is None else str(facts.trial),
        "seed": str(config.seed),
        "corpus": f"{facts.corpus}, fingerprint `{facts.fingerprint}`",
        "code version": f"`{facts.code}`",
        "LLM": f"`{config.model.llm.path}`",
        "speech encoder": f"`{config.model.encoder.path}`" if config.model.uses_audio else "",
        "trained parts": ", ".join(trained),
        "started from": config.model.init_from or "",
        "tasks and labels": "; ".join(tasks),
    }
    return TableView([Column(""), Column("")], [[name, value] for name, value in rows.items() if value])


def _figures(config: Config, facts: CardFacts) -> list[str]:
    counts = "; ".join(f"{task}: {_size(records)}" for task, (_, records) in facts.predictions.items())
    rows = []
    for name, value in facts.metrics.items():
        if isinstance(value, float) and not name.startswith(NO_QUALITY):
            interval = interval_of(facts.predictions, name, facts.roles)
            limits = "" if interval is None or interval.low is None else f"{interval.low:.3f} to {interval.high:.3f}"
            rows.append([name, f"{value:.4g}", limits])
    lines = [
        "## Figures",
        "",
        f"On the validation split, after epoch {facts.epoch} of {config.train.epochs}. "
        f"{counts or 'It was not evaluated'}.",
        "",
        *to_markdown(TableView(list(map(Column, ("metric", "value", "95 % interval by session"))), rows)),
    ]
    if facts.confirmed:
        lines += ["", "Under fresh seeds:", "", *(f"- {line}" for line in facts.confirmed)]
    return lines


def _size(records: Sequence[Record]) -> str:
    sessions = len({record.conversation for record in records})
    return f"{len(records)} items of {format_count(sessions, 'session')}"


def _commands(model: SpeechLLM) -> list[str]:
    audio = " --audio recordings" if model.config.uses_audio else ""
    lines = ["## Commands", "", "Run these in this folder. To code new sessions:", ""]
    lines += ["```bash", f"sweep predict . --csv sessions.csv{audio} --out coded", "```", ""]
    lines += ["To train it again from the corpus and the base models that `config.yaml` names:", ""]
    lines += ["```bash", "sweep train config.yaml --out again", "```", ""]
    if "lora" in model.trained_parts or any("lora_" in name for name in model.loaded):
        lines += ["To load the LoRA weights alone in Python:", "", "```python"]
        lines += [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({model.config.llm.path!r})",
            'llm = PeftModel.from_pretrained(base, "lora")',
            "```",
            "",
        ]
    return lines

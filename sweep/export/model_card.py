"""The model card of an exported trial: what it is, how good it was, what it is for, and how to have it again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.evaluation.metrics import Record
from model.parts import summarise_parts
from model.speech_llm.speech_llm import SpeechLLM
from sweep.analysis.leaderboard import Said, said_interval
from sweep.config.schema import Config

LIMITS = """\
It is meant for research on counselling dialogues that resemble the corpus it was trained on, as a first coding that a
trained coder checks on a sample before anything is concluded from it. Its figures come from the validation split, which
also chose among the trials and therefore flatters it; other languages, recordings, populations and code books were not
tested, and it must not be used to judge individual clients or counsellors."""
OTHER = ("train_loss", "seconds", "data_wait")  # what a trial reports beside figures of quality


@dataclass(frozen=True)
class Figures:
    """Of the last evaluation on the validation split."""

    epoch: int
    metrics: Mapping[str, Any]
    predictions: Said  # by task, its labels and records
    confirmed: Sequence[str]  # what trainings under fresh seeds say; none: it was not asked


def model_card(model: SpeechLLM, config: Config, said: Mapping[str, Any], code: str, figures: Figures) -> str:
    """The card in Markdown.

    Args:
        model: that is exported.
        config: of its trial.
        said: sweep, trial, corpus, fingerprint, roles.
        code: version that trained it.
        figures: of its trial.
    """
    title = said["sweep"] + ("" if said["trial"] is None else f", trial {said['trial']}")
    hears = {"text": "as text", "speech": "as sound", "text+speech": "as text and as sound"}[config.model.modality]
    return "\n".join(
        [
            f"# {title}",
            "",
            f"A speech LLM for counselling dialogues. It reads the turns before a turn as text, and the turn {hears}.",
            "",
            *_table(["", ""], _facts(model, config, said, code)),
            "",
            *_figure_lines(figures, config, said["roles"]),
            "",
            "## Use and limits",
            "",
            LIMITS,
            "",
            *_commands(model),
        ]
    )


def _facts(model: SpeechLLM, config: Config, said: Mapping[str, Any], code: str) -> list[list[str]]:
    trained = [
        f"{part.name} ({part.trained:,} parameters)" for part in summarise_parts(model, model.sources) if part.trained
    ]
    tasks = [f"{task}: {', '.join(known.labels) or 'a text'}" for task, known in model.tasks.items()]
    rows = {
        "sweep": said["sweep"],
        "trial": "trained alone" if said["trial"] is None else str(said["trial"]),
        "seed": str(config.seed),
        "corpus": f"{said['corpus']}, fingerprint `{said['fingerprint']}`",
        "code version": f"`{code}`",
        "LLM": f"`{config.model.llm.path}`",
        **({"speech encoder": f"`{config.model.encoder.path}`"} if config.model.uses_audio else {}),
        "trained parts": ", ".join(trained),
        "started from": config.model.init_from or "",
        "tasks and labels": "; ".join(tasks),
    }
    return [[name, _cell(value)] for name, value in rows.items() if value]


def _figure_lines(figures: Figures, config: Config, roles: Mapping[str, Sequence[str]]) -> list[str]:
    counts = [f"{task}: {_count(records)}" for task, (_, records) in figures.predictions.items()]
    epochs = f"after epoch {figures.epoch} of {config.train.epochs}"
    rows = [
        [name, f"{value:.4g}", _interval(name, figures.predictions, roles)]
        for name, value in figures.metrics.items()
        if isinstance(value, float) and not name.startswith(OTHER)
    ]
    return [
        "## Figures",
        "",
        f"On the validation split, {epochs}. {'; '.join(counts) or 'It was not evaluated'}.",
        "",
        *_table(["metric", "value", "95 % interval by session"], rows),
        *(["", "Under fresh seeds:", "", *(f"- {line}" for line in figures.confirmed)] if figures.confirmed else []),
    ]


def _count(records: list[Record]) -> str:
    sessions = len({record.conversation for record in records})
    return f"{len(records)} items of {sessions} session{'' if sessions == 1 else 's'}"


def _interval(name: str, said: Said, roles: Mapping[str, Sequence[str]]) -> str:
    """What is left empty has none."""
    found = said_interval(said, name, roles)
    return "" if found is None or found.low is None else f"{found.low:.3f} to {found.high:.3f}"


def _commands(model: SpeechLLM) -> list[str]:
    lines = ["## Commands", "", "In this folder. To code new sessions:", ""]
    sound = " --audio recordings" if model.config.uses_audio else ""
    lines += ["```bash", f"sweep predict . --csv sessions.csv{sound} --out coded", "```", ""]
    lines += ["To train it again, from the corpus and the base models that `config.yaml` names:", ""]
    lines += ["```bash", "sweep train config.yaml --out again", "```", ""]
    if "lora" in model.trained_parts or any("lora_" in name for name in model.loaded):
        lines += ["The LoRA weights alone, in Python:", "", "```python"]
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


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

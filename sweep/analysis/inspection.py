"""The parts of a model, and the examples of a corpus as the model reads them, before any training."""

import json
from collections.abc import Sequence
from pathlib import Path

from data.corpus.schema import SAMPLE_RATE, SPLITS
from data.errors import UserError
from data.loading.examples import Example, clip_samples, read_example
from data.loading.tasks import TASKS, Item, audio_row, has_audio, items
from data.shards.dataset import Shards
from model.evaluation.llm_check import check_llm
from model.parts import summarise_parts
from model.speech_llm.label_trie import shared_prefixes
from model.speech_llm.language_model import expert_weights, lora_reach
from model.speech_llm.prompt import CLIP, CLS, END, IGNORE
from model.speech_llm.speech_llm import SpeechLLM
from sweep.analysis.view import Column, TableView
from sweep.config.resolve import ResolvedConfig
from sweep.config.schema import Config
from sweep.execution.trial import open_shards

MOST_NAMES = 4  # layers in a line
UNCHECKED = "its family could not be checked; compare `sweep evaluate DIR --batch-size 1` with the sweep's metrics"


def parts_table(model: SpeechLLM, config: Config, title: str) -> TableView:
    """Return the parts of a model: their parameters, how many of them train, and at what peak learning rate."""
    rows = []
    parts = summarise_parts(model, model.sources)
    for part in parts:
        rate = getattr(config.train.learning_rates, part.name, None) or config.train.learning_rate
        source = part.loaded or "new"
        source = Path(source).name if Path(source).is_dir() else source
        rate_cell = f"{rate:.2e}" if part.trained else "frozen"
        rows.append([part.name, f"{part.parameters:,}", f"{part.trained:,}", rate_cell, source])
    total, trained = sum(part.parameters for part in parts), sum(part.trained for part in parts)
    rows.append(["all", f"{total:,}", f"{trained:,}", f"{trained / total:.2%}", ""])
    names = ("part", "parameters", "trained", "learning rate", "from")
    return TableView([Column(name, is_text=name in ("part", "from")) for name in names], rows, title)


def notes(model: SpeechLLM) -> list[str]:
    """Return how prompts start, what LoRA reaches, and a line for each pair of labels that begin alike."""
    alike = [
        f"{task}: labels {short!r} and {long!r} begin with the same tokens; the end-of-sequence token tells them apart"
        for task, answers in model.answers.items()
        for short, long in shared_prefixes(answers)
    ]
    unchecked = [] if check_llm(model.config.llm) else [f"{model.config.llm.path}: {UNCHECKED}"]
    return [_start(model), *_reach(model), *_encoder_lora(model), *unchecked, *alike]


def _start(model: SpeechLLM) -> str:
    """Return the line about the start of the prompts."""
    builder, setting = model.prompt_builder, f"model.prompt.bos {model.config.prompt.bos}"
    if model.config.prompt.format == "chat":
        return "prompts start as the chat template does, whatever model.prompt.bos is"
    start, bos = builder.tokenizer.hf.decode(builder.start), builder.tokenizer.hf.bos_token
    if builder.start:
        return f"prompts start with {start} ({setting})"
    if bos is None:
        return f"prompts start without BOS: the tokenizer has none ({setting})"
    why = "" if model.config.prompt.bos == "never" else ": the tokenizer puts none in front of a text"
    return f"prompts start without BOS{why} ({setting}; always adds {bos})"


def _encoder_lora(model: SpeechLLM) -> list[str]:
    """Return the line about the encoder's LoRA and the frozen layers below it."""
    if model.encoder is None or not model.config.encoder.lora.rank:
        return []
    lora, count = model.config.encoder.lora, len(model.encoder.transformer.layers)
    targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
    below = f"the {model.frozen_layers} below are" if model.frozen_layers else "none is"
    upper = "all" if lora.layers in (None, count) else f"the upper {lora.layers} of"
    return [f"LoRA of rank {lora.rank} on {targets} in {upper} {count} layers of the encoder; {below} computed once"]


def _reach(model: SpeechLLM) -> list[str]:
    """Return the line about the weights that LoRA reaches, and a warning if a pattern skips experts."""
    reach = lora_reach(model.llm)
    if reach is None:
        return []
    missed = ", ".join(f"{name} {share:.0%}" for name, share in reach.missed[:MOST_NAMES])
    missed += ", …" if len(reach.missed) > MOST_NAMES else ""
    lines = [
        f"LoRA reaches {reach.share:.0%} of the LLM's weights (embeddings aside): {', '.join(reach.reached)}"
        + (f"; not {missed}" if missed else "")
    ]
    if reach.share < 0.5 and reach.misses_experts:
        experts = [name for name, _ in reach.missed if name in expert_weights(model.llm)]
        lines.append(
            f"warning: model.lora.targets ({model.config.lora.targets}) skip {1 - reach.share:.0%} of the LLM's "
            f"weights; fused experts are no linear layers, so name them too ({', '.join(experts)})"
        )
    return lines


def settings_for(shards: Shards) -> list[str]:
    """Return overrides that make a configuration for any corpus: built-in models and a task that it has answers for."""
    overrides = ["name=inspect", f"data.shards={json.dumps(str(shards.folder))}"]
    overrides += [] if has_audio(shards) else ["model.modality=text"]
    return overrides + ([] if shards.manifest.labels else ["tasks.classify=0", "tasks.response=1"])


def choose(config: ResolvedConfig, task: str, split: str | None, wanted: str | None) -> Item | None:
    """Return the first item of a task, or the one with this id, in a split or in any; None if there is none.

    Raises:
        DataError: the split has nothing for the task.
    """
    shards = open_shards(config)
    names = {"quality": "conversation"}
    splits = [split] if split else SPLITS if wanted else ["train"]
    for item in (item for name in splits for item in items(shards, task, name)):
        if wanted in (None, shards.columns[names.get(task, "id")][item[1]]):
            return item
    return None


def example_lines(model: SpeechLLM, config: ResolvedConfig, item: Item) -> list[str]:
    """Return an example as the model reads it: the sequence, then the tokens that the loss is computed over.

    Vectors are shown in brackets; ⏎ is a line break.
    """
    shards = open_shards(config)
    example = read_example(shards, item, config.data, with_audio=False)
    samples = clip_samples(shards, item, config.data)
    measure, prompt, answer = (
        model.measure(example, samples),
        model.prompt_builder.prompt(example),
        model.answer(example),
    )
    clip = _clip(model, samples) if CLIP in prompt.ids else ""
    targets = [_token(model, target) for target in answer.targets if target != IGNORE]
    audio_turn = audio_row(shards, TASKS[item[0]], item[1])
    return [
        f"{example.task}: {example.id} ({example.conversation}, {example.speaker})",
        f"  reads     {_text(model, prompt.ids, clip)}",
        f"  answers   {_text(model, answer.inputs, clip)}",
        *([] if audio_turn is None else [f"  audio     {_audio(shards, audio_turn)}"]),
        *([] if not clip else [f"  clip      {_clip_positions(model, prompt.ids, samples)}"]),
        f"  loss over {' | '.join(targets)}",
        f"  loss mask {_mask(prompt.ids, answer.targets)}",
        f"  {_counts(prompt.ids, measure.predicted, prompt.dropped_turns, example)}",
    ]


def _audio(shards: Shards, row: int) -> str:
    columns = shards.columns
    start, end, samples = (columns[name][row] for name in ("t_start", "t_end", "n_samples"))
    seconds = f"{samples} samples, {samples / SAMPLE_RATE:.2f} s"
    times = "" if start is None or end is None else f", {start:.2f}-{end:.2f} s of the recording"
    flags = columns["flags"][row]
    return f"{columns['id'][row]}: {seconds}{times}{f' ({flags})' if flags else ''}"


def _clip_positions(model: SpeechLLM, ids: Sequence[int], samples: int) -> str:
    """Return the positions of the clip's embeddings in the sequence that the LLM reads."""
    assert model.encoder is not None
    assert model.adapter is not None
    first, count = list(ids).index(CLIP), model.adapter.num_embeddings(model.encoder.num_frames(samples))
    return f"positions {first} to {first + count - 1} of {len(ids) - 1 + count}"


def _mask(prompt: Sequence[int], targets: Sequence[int]) -> str:
    """Return one character per token: · without loss, ■ with loss; the prompt has none."""
    marks = "".join("·" if target == IGNORE else "■" for target in targets)
    return f"prompt {len(prompt)} x ·, answer {marks}"


def _counts(ids: Sequence[int], predicted: int, dropped: int, example: Example) -> str:
    words = f"{sum(token >= 0 for token in ids)} text tokens, {predicted} predicted"
    return f"{words}, {len(example.turns) - dropped} turns, {dropped} dropped"


def _clip(model: SpeechLLM, samples: int) -> str:
    assert model.encoder is not None
    assert model.adapter is not None
    frames = model.encoder.num_frames(samples)
    seconds = samples / SAMPLE_RATE
    return f"[audio: {seconds:.2f} s → {frames} frames → {model.adapter.num_embeddings(frames)} embeddings]"


def _text(model: SpeechLLM, ids: Sequence[int], clip: str) -> str:
    """Return token ids as text, each run of tokens decoded together."""
    vectors = {CLIP: clip, END: "[END]", CLS: "[CLS]"}
    pieces: list[str] = []
    run: list[int] = []
    for token in (*ids, None):
        if token is not None and token >= 0:
            run.append(token)
            continue
        pieces.append(model.prompt_builder.tokenizer.hf.decode(run))
        run = []
        if token is not None:
            pieces.append(vectors[token])
    return "".join(pieces).replace("\n", "⏎")


def _token(model: SpeechLLM, token: int) -> str:
    text = model.prompt_builder.tokenizer.hf.decode([token]).replace("\n", "⏎")
    return f"{text!r} {token}"


def lines(model: SpeechLLM, config: ResolvedConfig, split: str | None, wanted: str | None) -> list[str]:
    """Return an example of every task.

    Raises:
        UserError: no task has an item with the wanted id.
    """
    chosen = [item for task in model.tasks if (item := choose(config, task, split, wanted)) is not None]
    if not chosen:
        where = f"the {split} split has" if split else "there is"
        raise UserError(
            f"--example {wanted}: {where} no such item for {', '.join(model.tasks)}; ids are listed in "
            "predictions.json of a trial, e.g. c003/7"
        )
    return [line for item in chosen for line in example_lines(model, config, item)]

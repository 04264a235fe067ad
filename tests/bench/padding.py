"""Padding: which share of the positions that encoder and LLM compute is none of any clip's or dialogue's own.

On AnnoMI's real lengths: a turn ends where the next one starts, text in words. Its times are whole seconds, so
many clips are exactly equal; "cut finely" moves ends at random within their second, as alignment would.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from data.corpus.config import CorpusConfig
from data.corpus.schema import SAMPLE_RATE, Conversation
from data.importers.tables.annomi import read_annomi
from data.loading.batching import Cost, groups, micro_batches, plan, share
from sweep.config.files import load
from sweep.config.schema import Config
from tests.bench.measure import Row
from tests.conftest import SHARED

GOAL, EPOCHS, TRAINING = 0.015, 5, 0.7
TOKENS_A_WORD, TOKENS_A_TURN, TOKENS_AROUND = 1.3, 4, 12
KERNELS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))  # of HuBERT: sizes and strides


def run() -> list[Row]:
    """The goals of padding."""
    csv = SHARED / "AnnoMI-simple.csv"
    if not csv.exists():
        return [Row("padding", "computed", goal=GOAL, most=True, note=f"{csv} is not at hand")]
    conversations = read_annomi(csv, None, CorpusConfig()).conversations
    conversations = conversations[: round(TRAINING * len(conversations))]
    rows = []
    for preset in ("llama-3b-hubert-large", "annomi"):
        config = load(preset)
        for times in ("as given", "cut finely") if config.model.uses_audio else ("as given",):
            for trains in (False, True) if config.model.uses_audio else (False,):
                costs = list(measured(conversations, config, fine=times == "cut finely", trains=trains))
                for workers in (1, 2):
                    encoder = f", encoder {'trains' if trains else 'frozen'}" if config.model.uses_audio else ""
                    rows += wasted(costs, config, workers, f"{preset}{encoder}, times {times}, workers {workers}")
    return rows


def measured(conversations: Sequence[Conversation], config: Config, *, fine: bool, trains: bool) -> Iterator[Cost]:
    """The cost of every turn with sound, as `SpeechLLM.measure` has it: a frozen encoder takes clip by clip."""
    rng = np.random.default_rng(0)
    adapter = config.model.adapter
    for conversation in conversations:
        words = [TOKENS_A_TURN + round(TOKENS_A_WORD * len(turn.text.split())) for turn in conversation.turns]
        for place, turn in enumerate(conversation.turns):
            if turn.start is None or turn.end is None or turn.end <= turn.start:
                continue
            seconds = max(0.3, turn.end - turn.start + (rng.uniform(-0.5, 0.5) if fine else 0))
            frames = round(seconds * SAMPLE_RATE) if config.model.uses_audio else 0
            for kernel, stride in KERNELS if frames else ():
                frames = (frames - kernel) // stride + 1
            tokens = TOKENS_AROUND + (0 if config.model.modality == "speech" else words[place])
            for length in reversed(words[max(0, place - config.data.history) : place]):
                if tokens + length > config.model.llm.max_text_tokens:
                    break
                tokens += length
            clip = max(0, frames - adapter.window) // adapter.stride + 1 if frames else 0
            yield Cost(tokens + clip, frames if trains else 0)


def wasted(costs: Sequence[Cost], config: Config, workers: int, where: str) -> list[Row]:
    """The rows of the LLM and of the encoder, an epoch a run."""
    llm = Row(f"padding of the LLM: {where}", "computed", goal=GOAL, most=True)
    encoder = Row(f"padding of the encoder: {where}", "computed", goal=GOAL, most=True)
    for epoch in range(EPOCHS):
        read, heard, steps = [], [], plan(costs, batch_size=config.train.batch_size, seed=0, epoch=epoch)
        for own in (share(step, rank, workers) for step in steps for rank in range(workers)):
            for part in micro_batches([costs[position] for position in own], config.train.token_budget):
                chosen = [costs[own[place]] for place in part]
                read.append([cost.tokens for cost in chosen])
                frames = [cost.frames for cost in chosen]
                heard += [[frames[place] for place in group] for group in groups(frames)]
        for row, parts in ((llm, read), (encoder, heard)):
            if computed := sum(max(part) * len(part) for part in parts):
                row.runs.append(1 - sum(map(sum, parts)) / computed)
                row.note = f"{len(costs) / len(parts):.1f} items at once"
    return [llm, encoder] if encoder.runs else [llm]

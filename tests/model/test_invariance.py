"""The same number at any batch size, order and padding: every stage of the model, in fp32, to a relative 1e-5.

The reference is each example computed alone, without packing. `test_mutations.py` puts known faults back, one at a
time, and checks that these tests fail.
"""

from collections.abc import Callable, Sequence
from itertools import chain, combinations, cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data.config import DataConfig, TaskWeights
from data.loading.batching import share
from data.loading.examples import Example
from data.loading.tasks import answer_sets
from data.shards.dataset import Shards
from model.config import LossConfig, TrainConfig
from model.evaluation.evaluator import evaluate
from model.evaluation.metrics import Record, summarise
from model.evaluation.scoring import generate, label_scores
from model.evaluation.split_data import TrialData
from model.objectives.losses import answer_losses
from model.speech_llm import sharding
from model.speech_llm.packing import set_packing
from model.speech_llm.speech_llm import SpeechLLM
from model.training import trainer as training
from model.training.random_state import seed_everything
from model.training.trainer import Trainer
from tests.model.common import as_two_workers, build, close, perturb_lora, replies, settings, soft_targets
from tests.model.families import make
from tests.tiny_models import AUDIO_LLMS, ENCODERS

Batching = list[list[int]]
Compute = Callable[[list[Example]], Sequence[Any]]
ALONE: Batching = [[index] for index in range(8)]
BATCHINGS: list[Batching] = [  # sizes 2, 3 and 8 in a shuffled, the given and the reversed order
    [[5, 2], [0, 7], [1, 6], [3, 4]],
    [[0, 1, 2], [3, 4, 5], [6, 7]],
    [[7, 6, 5, 4, 3, 2, 1, 0]],
]
# Whether batches are packed, in turns.
PACKED: dict[str, tuple[bool, ...]] = {"packed": (True,), "mixed": (True, False)}
LOSSES = LossConfig(distillation=0.5, temperature=2.0, hidden=0.5)
TASKS = TaskWeights(classify=1.0, forecast=0.5, response=0.3)


def losses(model: SpeechLLM, part: list[Example]) -> list[Tensor]:
    return list(torch.stack(list(answer_losses(model, part, LOSSES).by_name().values()), dim=1))


def vote_losses(model: SpeechLLM, part: list[Example]) -> list[Tensor]:
    targets = dict(zip(range(8), soft_targets([part[0]] * 8), strict=True))
    found = answer_losses(model, part, LOSSES, [targets[int(example.id[2:])] for example in part])
    weighted_B = found.weighted_sum(LOSSES).detach()
    return list(torch.stack([*found.by_name().values(), weighted_B], dim=1))


STAGES: dict[str, Callable[[SpeechLLM], Compute]] = {
    "clips": lambda model: model.clips,
    "prompts": lambda model: model.prompts,
    "scores": lambda model: lambda part: list(label_scores(model, part)),
    "losses": lambda model: lambda part: losses(model, part),
    "losses of votes": lambda model: lambda part: vote_losses(model, part),
    "losses of replies": lambda model: lambda part: losses(model, replies(part)),
}


def by_example(compute: Compute, examples: list[Example], batching: Batching) -> list[Any]:
    results: dict[int, Any] = {}
    for batch in batching:
        results |= dict(zip(batch, compute([examples[index] for index in batch]), strict=True))
    return [results[index] for index in range(len(examples))]


@torch.no_grad()
def check_stages(
    stages: Sequence[str],
    model: SpeechLLM,
    examples: list[Example],
    tolerance: float = 1e-5,
    packed: Sequence[bool] = (False,),
) -> None:
    """Compare stages in every batching with each example alone. Stages of one batch share the clips' embeddings."""
    encode, cache, turns = model.clips, {}, cycle(packed)

    def clips(part: Sequence[Example]) -> list[Tensor]:
        key = tuple(example.id for example in part)
        if key not in cache:
            cache[key] = encode(part)
        return cache[key]

    model.clips = clips
    for stage in stages:
        compute = STAGES[stage](model)
        set_packing(model.llm, packs=False)
        alone = by_example(compute, examples, ALONE)

        def batch(part: list[Example], compute: Compute = compute) -> Sequence[Any]:
            set_packing(model.llm, packs=next(turns))
            return compute(part)

        for batching in BATCHINGS:
            for batched, reference in zip(by_example(batch, examples, batching), alone, strict=True):
                assert batched.shape == reference.shape, stage
                assert close(batched, reference, tolerance), stage


@pytest.mark.parametrize("kind", [*ENCODERS, *AUDIO_LLMS])
def test_stages_do_not_depend_on_the_batch(
    kind: str, models: Path, examples: list[Example], stages: Sequence[str] = tuple(STAGES)
) -> None:
    check_stages(stages, build(models, kind), examples)


@pytest.mark.parametrize(
    ("family", "packed", "stages"),
    [
        ("llama", "packed", ["scores", "losses", "losses of votes", "losses of replies"]),
        pytest.param("llama", "mixed", ["losses"], marks=pytest.mark.long),
        pytest.param("gpt2", "packed", ["losses"], marks=pytest.mark.long),  # test_mutations.py runs it, too
    ],
)
def test_packed_stages_equal_unpacked_ones(
    family: str, packed: str, stages: Sequence[str], models: Path, examples: list[Example], tmp_path: Path
) -> None:
    """GPT-2 has absolute positions: rotary ones give the same if all are shifted."""
    llm = models / "llm" if family == "llama" else make(family, tmp_path / "llm")
    model = build(models, llm={"path": str(llm)}, lora={"rank": 2, "dropout": 0.0, "targets": "all-linear"})
    check_stages(stages, model, examples, packed=PACKED[packed])


VARIANTS: dict[str, dict[str, Any]] = {
    "text": {"modality": "text"},
    "speech": {"modality": "speech", "cls": "after"},
    "audio before text": {"prompt": {"order": "sound-text"}, "cls": "none"},
    "stacked frames, MLP": {"adapter": {"kind": "stack", "window": 4, "stride": 4, "hidden": 16}},
    "convolution": {"adapter": {"kind": "conv", "window": 5, "stride": 3}},
    "queries over a clip": {"adapter": {"kind": "queries", "queries": 3}},
    "queries in windows": {"adapter": {"kind": "queries", "rate": 13.0, "hidden": 24}},
    "merged frames": {"adapter": {"kind": "merge", "rate": 13.0}},
    "merged frames, frozen": {"adapter": {"kind": "merge"}, "trainable": "adapter+lora+tokens"},
    "DoRA": {"lora": {"rank": 2, "dora": True, "dropout": 0.0}},
    "eager attention": {"llm": {"attention": "eager"}},
    "encoder frozen": {"trainable": "adapter+lora+tokens"},
    "LoRA off": {"lora": {"enabled": False}},
    "encoder: LoRA": {"encoder": {"lora": {"rank": 2}}, "trainable": "new"},
    "encoder: LoRA on the upper layer": {"encoder": {"lora": {"rank": 2, "layers": 1}}, "trainable": "new"},
    "encoder: weighted layers": {"encoder": {"layers": "weighted"}},
    "encoder: two layers": {"encoder": {"layers": [0, 2]}, "adapter": {"kind": "conv"}},
    "encoder: weighted layers, frozen": {"encoder": {"layers": "weighted"}, "trainable": "adapter+lora+tokens"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_do_not_depend_on_the_batch(variant: str, models: Path, examples: list[Example]) -> None:
    check_stages(["scores", "losses of votes", "losses of replies"], build(models, **VARIANTS[variant]), examples)


@pytest.mark.parametrize(
    ("kind", "layers"), [*product(["hubert-group", "whisper"], ["last", "weighted"]), *product(AUDIO_LLMS, ["last"])]
)
def test_layers_above_frozen_ones_do_not_depend_on_the_batch(
    kind: str, layers: str, models: Path, examples: list[Example]
) -> None:
    model = build(models, kind, trainable="encoder.*.layers.1.*+adapter+lora+tokens", encoder={"layers": layers})
    assert model.frozen_layers == 1
    check_stages(["clips"], model, examples)


def test_generated_texts_do_not_depend_on_the_batch(models: Path, examples: list[Example]) -> None:
    model = build(models)
    alone = by_example(lambda part: generate(model, part), replies(examples), ALONE)
    assert len({reply.text for reply in alone}) > 1
    for packs, batching in zip((False, True, False), BATCHINGS, strict=True):
        set_packing(model.llm, packs=packs)
        assert by_example(lambda part: generate(model, part), replies(examples), batching) == alone


@pytest.mark.parametrize("batch_size", [3, 16, None])
def test_metrics_do_not_depend_on_the_batch_size(batch_size: int | None, models: Path, corpus: Shards) -> None:
    """None: as many as the token budget allows, and packed."""
    model = trial_model(models, corpus)
    data = TrialData.open(corpus, model, DataConfig(history=2), ("val",))
    labels = {task: answer_set.labels for task, answer_set in model.tasks.items()}
    alone = summarise(evaluate(model, data, "val", 10**6, 1), labels, corpus.manifest.roles)
    set_packing(model.llm, packs=batch_size is None)
    together = summarise(evaluate(model, data, "val", 300, batch_size), labels, corpus.manifest.roles)
    assert together == pytest.approx(alone, rel=1e-5)


def test_frozen_encoder_is_the_same_in_training(models: Path, examples: list[Example]) -> None:
    """Dropout, SpecAugment, layer drop and statistics of the batch are off."""
    for kind in ("hubert-layer", "conformer-relative", "granite-speech"):
        model = build(models, kind, trainable="adapter+lora+tokens")
        expected = model.clips(examples)
        model.train()
        assert all(map(torch.equal, model.clips(examples), expected))


def trial_model(models: Path, corpus: Shards, kind: str = "hubert-layer") -> SpeechLLM:
    seed_everything(3)
    return perturb_lora(SpeechLLM(settings(models, kind), answer_sets(corpus, TASKS.active())))


def one_step(
    models: Path,
    corpus: Shards,
    cut: Batching | None,
    rank: int = 0,
    world: int = 1,
    kind: str = "hubert-layer",
    votes: bool = False,
    packed: Sequence[bool] = (False,),
    minimised: LossConfig = LOSSES,
    size: int = 8,
    shards: bool = False,
) -> dict[str, Tensor]:
    """Return clipped gradients and weights after one optimizer step over items of three tasks.

    Args:
        models: folder of models.
        corpus: its training split has the items.
        cut: the micro-batches, as positions in the step; None uses the token budget and eight items.
        rank: of this worker.
        world: number of workers.
        kind: of the encoder.
        votes: whether the votes of annotators are the targets.
        packed: whether micro-batches are packed, in turns.
        minimised: the losses.
        size: items of the step, if it is not cut.
        shards: whether the workers divide the LLM; then they compute one item at a time.
    """
    model = trial_model(models, corpus, kind)
    if shards:
        model.shard("cpu")
    data = TrialData.open(corpus, model, DataConfig(history=2), ("train",), votes=votes)
    config = TrainConfig(
        learning_rate=1e-3,
        warmup=0,
        losses=minimised,
        class_weights="balanced",
        token_budget=1 if shards else 16_384,
    )
    trainer = Trainer(model, data, config, TASKS, 0, corpus.folder)
    model.train()
    items = data.splits["train"].items
    first = {task: [name for name, _ in items].index(task) for task in model.tasks}
    size = size if cut is None else sum(map(len, cut))
    step = [first[task] + index for index in range(size) for task in model.tasks][:size]
    own = share(step, rank, world)
    (examples,) = data.read("train", [own])
    result: dict[str, Tensor] = {}

    def keep_gradients(*_: Any) -> None:
        named = model.named_parameters()
        result.update({f"gradient of {name}": p.grad.clone() for name, p in named if p.grad is not None})

    trainer.optimizer.register_step_pre_hook(keep_gradients)
    turns, losses_of = cycle(packed), training.answer_losses  # with the fault that is being tested

    def in_turns(*arguments: Any) -> Any:
        set_packing(model.llm, packs=next(turns))
        return losses_of(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "answer_losses", in_turns)
        if cut is not None:
            patch.setattr(model, "micro_batches", lambda *_: cut)
        trainer.optimizer_step(step, own, examples)
    trainer.losses.read(trainer.progress.sums)
    result |= {f"weight {name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return result | {"losses": torch.tensor([value for pair in trainer.progress.sums.values() for value in pair])}


def check_equal(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare losses, gradients (relative to the largest of all: some vanish) and weights.

    AdamW divides a gradient by its size, so a weight whose true gradient is zero (the bias of keys, for example) moves
    by noise. Weights are compared where the gradient is above that.
    """
    assert result.keys() == expected.keys()
    assert close(result["losses"], expected["losses"])
    gradients = [name for name in expected if name.startswith("gradient of ")]
    largest = max(float(expected[name].abs().max()) for name in gradients)
    assert largest > 0
    for name in gradients:
        assert float((result[name] - expected[name]).abs().max()) <= 1e-5 * largest, name
        weight = name.replace("gradient of", "weight")
        clear = expected[name].abs() > 1e-3 * largest
        difference = float(((result[weight] - expected[weight]) * clear).abs().max())
        assert difference <= 1e-5 * float(expected[weight].abs().max())


@pytest.mark.parametrize("kind", ["hubert-layer", "hubert-group", "w2v-bert", "whisper", *AUDIO_LLMS])
def test_step_does_not_depend_on_the_micro_batches(kind: str, models: Path, corpus: Shards) -> None:
    alone = one_step(models, corpus, ALONE, kind=kind)
    for batching in BATCHINGS:
        check_equal(one_step(models, corpus, batching, kind=kind), alone)


@pytest.mark.parametrize(("packed", "votes"), [("mixed", False), pytest.param("packed", True, marks=pytest.mark.long)])
def test_packed_step_equals_unpacked_one(packed: str, votes: bool, models: Path, disputed: Shards) -> None:
    alone = one_step(models, disputed, ALONE, votes=votes)
    for batching in BATCHINGS[1:]:
        check_equal(one_step(models, disputed, batching, votes=votes, packed=PACKED[packed]), alone)


def test_step_on_votes_does_not_depend_on_the_micro_batches(models: Path, disputed: Shards) -> None:
    alone = one_step(models, disputed, ALONE, votes=True)
    for batching in BATCHINGS:
        check_equal(one_step(models, disputed, batching, votes=True), alone)
    assert not torch.equal(one_step(models, disputed, ALONE)["losses"], alone["losses"])


@pytest.mark.parametrize("size", [5, pytest.param(8, marks=pytest.mark.long)])
def test_step_does_not_depend_on_any_accumulation_split(size: int, models: Path, corpus: Shards) -> None:
    """All 16 ways to cut a step of five items into consecutive micro-batches, or all 128 of eight."""
    alone = one_step(models, corpus, [[index] for index in range(size)])
    for borders in chain.from_iterable(combinations(range(1, size), count) for count in range(size - 1)):
        cut = [list(range(*pair)) for pair in zip((0, *borders), (*borders, size), strict=True)]
        check_equal(one_step(models, corpus, cut), alone)


def worker(rank: int, models: Path, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    torch.save(one_step(models, Shards(folder), None, rank, 2), out / f"{rank}.pt")
    dist.destroy_process_group()


def evaluated(models: Path, corpus: Shards, shards: bool = False) -> tuple[list[Record], float]:
    """Return the records of a split, and the share of the weights of the LLM's layers that this worker has."""
    model = trial_model(models, corpus)
    layers = [tensor for name, tensor in model.llm.named_parameters() if ".layers." in name]
    size = sum(tensor.numel() for tensor in layers)
    if shards:
        model.shard("cpu")
    layers = [tensor for name, tensor in model.llm.named_parameters() if ".layers." in name]
    own = sum((tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel() for tensor in layers)
    data = TrialData.open(corpus, model, DataConfig(history=2), ("val",))
    return evaluate(model, data, "val", 1 if shards else 300), own / size


def sharding_worker(rank: int, models: Path, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    corpus, ask, idle = Shards(folder), sharding.any_worker, list[bool]()

    def any_worker(busy: bool) -> list[bool]:
        [others] = ask(busy)
        idle.append(others and not busy)
        return [others]

    sharding.any_worker = any_worker  # of this process
    step = one_step(models, corpus, None, rank, 2, minimised=LossConfig(), size=7, shards=True)
    idle_in_step = sum(idle)
    torch.save((step, *evaluated(models, corpus, shards=True), idle_in_step, sum(idle)), out / f"{rank}.pt")
    dist.destroy_process_group()


def test_sharded_llm_computes_the_same(models: Path, corpus: Shards, tmp_path: Path) -> None:
    """A step over micro-batches of which workers have different numbers, label scores, and replies."""
    step = one_step(models, corpus, None, minimised=LossConfig(), size=7)
    (records, whole), waited = evaluated(models, corpus), list[tuple[int, int]]()
    as_two_workers(sharding_worker, models, corpus.folder, tmp_path)
    for rank in range(2):
        found_step, found_records, share, *idle = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        waited.append((idle[0], idle[1] - idle[0]))
        check_equal(found_step, step)
        assert [record.prediction for record in found_records] == [record.prediction for record in records]
        losses_of = [torch.tensor([record.loss for record in part]) for part in (found_records, records)]
        assert close(*losses_of)
        assert share < 0.6 * whole
    assert all(map(any, zip(*waited, strict=True))), "no worker had less to compute than the other"


def test_step_does_not_depend_on_the_number_of_workers(models: Path, corpus: Shards, tmp_path: Path) -> None:
    alone = one_step(models, corpus, None)
    as_two_workers(worker, models, corpus.folder, tmp_path)
    for rank in range(2):
        check_equal(torch.load(tmp_path / f"{rank}.pt"), alone)

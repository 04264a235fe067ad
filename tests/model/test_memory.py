"""Out of memory: less is computed at once, the step is made again, and the result is that of the smaller budget."""

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data.shards.dataset import Shards
from model.checkpoints import checkpoint
from model.runtime import memory
from model.runtime.memory import OutOfMemoryError
from model.speech_llm.language_model import load_llm, shared_view
from model.training import metrics_log as curve
from model.training import trainer as train
from tests.model.common import as_two_workers, close
from tests.model.trials import CONFIG, TWO, Trial, history

WHOLE = CONFIG.model_copy(update={"token_budget": 10**6, "batch_size": 9})
WORDS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
)


def full_above(monkeypatch: pytest.MonkeyPatch, most: int, error: RuntimeError = WORDS[0]) -> list[int]:
    """A device that holds so many examples at once; counts those that were computed."""
    sizes: list[int] = []
    original = train.answer_losses

    def compute(model: Any, examples: Any, config: Any) -> Any:
        torch.rand(3)  # a draw that must not be missing in the second try
        if len(examples) > most:
            raise error
        sizes.append(len(examples))
        return original(model, examples, config)

    monkeypatch.setattr(train, "answer_losses", compute)
    return sizes


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = checkpoint.load(folder / checkpoint.FILE)["tensors"]
    return found


@pytest.mark.parametrize("error", WORDS, ids=["cuda", "cpu"])
def test_a_step_that_does_not_fit_is_made_again_with_less_at_once(
    error: RuntimeError, models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trial(train=WHOLE).run(models, corpus, tmp_path / "whole")
    with monkeypatch.context() as patch:
        sizes = full_above(patch, 2, error)
        Trial(train=WHOLE).run(models, corpus, tmp_path / "small")
    assert max(sizes) <= 2
    one, other = tensors(tmp_path / "small"), tensors(tmp_path / "whole")
    assert all(close(one[name], other[name], 1e-3) for name in one)  # AdamW divides by small second moments
    pairs = zip(history(tmp_path / "small"), history(tmp_path / "whole"), strict=True)
    assert all(small["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5) for (_, small), (_, whole) in pairs)
    notes = [line["note"] for line in map(json.loads, (tmp_path / "small" / curve.FILE).open()) if "note" in line]
    assert notes[0].startswith("out of memory with 6 examples at a time; train.token_budget is ")


def test_the_step_is_what_the_smaller_budget_gives(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, dropout included: the generators are put back to where the step began."""
    dropout = {"lora": {"rank": 4, "dropout": 0.2}}
    with monkeypatch.context() as patch:
        full_above(patch, 4)
        Trial(model=dropout, train=WHOLE).run(models, corpus, tmp_path / "halved")
        budget = int((tmp_path / "halved" / "token_budget").read_text())
        small = WHOLE.model_copy(update={"token_budget": budget})
        Trial(model=dropout, train=small).run(models, corpus, tmp_path / "small")
    assert budget < 10**6
    one, other = tensors(tmp_path / "halved"), tensors(tmp_path / "small")
    # Steps before the last halving were cut into larger parts, so this holds where the first step already found it.
    found = [line for line in map(json.loads, (tmp_path / "halved" / curve.FILE).open()) if "note" in line]
    assert {line["step"] for line in found} == {9}
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_was_summed_before_is_not_counted_twice(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first part of a step fits, the second one does not."""
    original, calls = train.answer_losses, []

    def compute(model: Any, examples: Any, config: Any) -> Any:
        calls.append(len(examples))
        if len(calls) == 2:
            raise WORDS[0]
        return original(model, examples, config)

    with monkeypatch.context() as patch:
        patch.setattr(train, "answer_losses", compute)
        Trial(train=WHOLE).run(models, corpus, tmp_path / "halved")
    assert calls[1] > 1
    small = WHOLE.model_copy(update={"token_budget": int((tmp_path / "halved" / "token_budget").read_text())})
    Trial(train=small).run(models, corpus, tmp_path / "small")
    one, other = tensors(tmp_path / "halved"), tensors(tmp_path / "small")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_smaller_budget_is_kept_for_later_attempts(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial(train=WHOLE)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        full_above(patch, 4)
        model, data = trial.start(models, corpus)
        train.fit(model, data, trial.train, trial.tasks, trial.seed, tmp_path, lambda *_: 1 // 0)
    tried: list[int] = []
    original = train.answer_losses
    monkeypatch.setattr(train, "answer_losses", lambda *args: tried.append(len(args[1])) or original(*args))
    trial.run(models, corpus, tmp_path)
    assert 0 < max(tried) <= 4


def test_an_example_that_does_not_fit_by_itself_is_one_error(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_above(monkeypatch, 0)
    with pytest.raises(
        OutOfMemoryError, match=r"^out of memory with one example at a time \(\d+ tokens\); lower "
    ) as error:
        Trial(train=WHOLE).run(models, corpus, tmp_path)
    assert (error.value.reason, error.value.common) == ("out of memory", False)


def test_another_runtime_error_is_none_of_it(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_above(monkeypatch, 4, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        Trial(train=WHOLE).run(models, corpus, tmp_path)
    assert not (tmp_path / "token_budget").exists()


def test_an_optimizer_without_memory_does_not_make_a_step_twice(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of its parameters may have moved already."""

    def full(*_: Any) -> None:
        raise WORDS[0]

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(OutOfMemoryError, match=r"^out of memory in the step of the optimizer; train fewer parameters"):
        Trial(train=WHOLE).run(models, corpus, tmp_path)


def test_an_evaluation_that_does_not_fit_is_made_again(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model.evaluation import evaluator as evaluate

    trial = Trial(tasks=TWO, train=WHOLE)
    trial.run(models, corpus, tmp_path / "whole")
    original, sizes = evaluate.predict, []

    def predict(model: Any, examples: Any) -> Any:
        if len(examples) > 3:
            raise WORDS[0]
        sizes.append(len(examples))
        return original(model, examples)

    monkeypatch.setattr(evaluate, "predict", predict)
    trial.run(models, corpus, tmp_path / "small")
    assert max(sizes) <= 3
    for (_, small), (_, whole) in zip(history(tmp_path / "small"), history(tmp_path / "whole"), strict=True):
        assert small.keys() == whole.keys()
        assert small["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    monkeypatch.setattr(evaluate, "predict", lambda *_: (_ for _ in ()).throw(WORDS[0]))
    with pytest.raises(OutOfMemoryError, match="one example at a time"):
        trial.run(models, corpus, tmp_path / "none")


SHARED = Trial(train=WHOLE.model_copy(update={"epochs": 1, "batch_size": 32}))


def worker(rank: int, world: int, models: Path, folder: Path, out: Path) -> None:
    """The second worker has less memory than its part of a step takes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=world)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            full_above(patch, 3)
        SHARED.run(models, Shards(folder), out / "trial")


def restarted(models: Path, corpus: Shards, out: Path) -> bool:
    """Start two workers as a group that starts again when one of them fails; whether they came to the end."""
    (out / "rendezvous").unlink(missing_ok=True)
    try:
        as_two_workers(worker, 2, models, corpus.folder, out)
    except Exception as error:
        assert "OutOfMemoryError" in str(error) or "Connection" in str(error)
        return False
    return True


def test_several_workers_start_again_with_less(models: Path, corpus: Shards, tmp_path: Path) -> None:
    ends = [restarted(models, corpus, tmp_path) for _ in range(2)]
    assert ends == [False, True]
    assert int((tmp_path / "trial" / "token_budget").read_text()) < 10**6
    assert len(history(tmp_path / "trial")) == 1


def test_words_of_memory() -> None:
    assert all(map(memory.is_out_of_memory, WORDS))
    assert not memory.is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


def test_base_models_are_kept_as_long_as_there_is_room(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An axis of two LLMs loads each once; where only one fits, the other is gone before the next is loaded."""
    paths = [str(shutil.copytree(models / "llm", tmp_path / name)) for name in "ab"]
    one, two = (load_llm(path, "float32", "cpu") for path in paths)
    assert one is not two
    assert [load_llm(path, "float32", device="cpu") for path in paths] == [one, two]
    assert load_llm(paths[0], "bfloat16", "cpu") is not one

    monkeypatch.setattr(memory, "KEPT_SHARE", 0.0)
    view, dead = shared_view(one), weakref.ref(one)
    del one
    assert load_llm(paths[1], "float32", "cpu") is two, "what is there already asks for no room"
    third = load_llm(paths[0], "float32", "meta")
    gc.collect()
    assert dead() is None, "the view of a trial does not hold the model"
    assert load_llm(paths[0], "float32", "meta") is third
    assert next(view.parameters()).sum().isfinite()
    assert load_llm(paths[1], "float32", "cpu") is not two

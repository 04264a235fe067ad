"""Out of memory: less is computed at once, the step is repeated, and the result is that of the smaller budget."""

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data.shards.dataset import Shards
from model.checkpoints import checkpoint
from model.evaluation import evaluator
from model.runtime import memory
from model.runtime.memory import OutOfMemoryError
from model.speech_llm.language_model import load_llm, shared_view
from model.training import trainer as training
from model.training.metrics_log import MetricsLog
from tests.model.common import as_two_workers
from tests.model.trials import CONFIG, DROPOUT, TWO, Trial, history

WHOLE = CONFIG.model_copy(update={"token_budget": 10**6, "batch_size": 9})
ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
)


def full_above(patch: pytest.MonkeyPatch, most: int, call: int = 0, error: RuntimeError = ERRORS[1]) -> list[int]:
    """Patch a device that holds so many examples at once (in one call, or in all); return the sizes that were tried."""
    sizes: list[int] = []
    original = training.answer_losses

    def compute(model: Any, examples: Any, *more: Any) -> Any:
        torch.rand(3)  # the second try must draw the same again
        sizes.append(len(examples))
        if len(examples) > most and call in (0, len(sizes)):
            raise error
        return original(model, examples, *more)

    patch.setattr(training, "answer_losses", compute)
    return sizes


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / checkpoint.FILE)["tensors"]


@pytest.mark.parametrize(("most", "call"), [(4, 0), (1, 2)], ids=["first part", "second part"])
def test_step_that_does_not_fit_equals_that_of_a_smaller_budget(
    most: int, call: int, models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, dropout included, also where a part of the step was summed already; and the budget is kept."""
    trial = Trial(model={"lora": DROPOUT}, train=WHOLE)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        full_above(patch, most, call)
        trial.run(models, corpus, tmp_path / "halved", lambda *_: 1 // 0)
    lines = [line for line in MetricsLog(tmp_path / "halved").lines() if line.note]
    assert {line.step for line in lines} == {9}  # the first step
    assert lines[0].note.startswith("out of memory with ")
    assert " examples at a time; train.token_budget is " in lines[0].note
    budget = int((tmp_path / "halved" / "token_budget").read_text())
    with monkeypatch.context() as patch:
        small = Trial(model={"lora": DROPOUT}, train=WHOLE.model_copy(update={"token_budget": budget}))
        tried = full_above(patch, 99)
        trial.run(models, corpus, tmp_path / "halved")
        assert 0 < max(tried) <= 8
        small.run(models, corpus, tmp_path / "small")
    halved, expected = tensors(tmp_path / "halved"), tensors(tmp_path / "small")
    assert all(torch.equal(halved[name], expected[name]) for name in halved)


def test_error_that_no_budget_avoids_is_one_line(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One example that does not fit, an optimizer (half of its step may be made), and an error of another kind."""

    def run() -> None:
        Trial(train=WHOLE).run(models, corpus, tmp_path)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="shapes differ"):
        full_above(patch, 4, error=RuntimeError("shapes differ"))
        run()
    assert not (tmp_path / "token_budget").exists()
    single = r"^out of memory with one example at a time \(\d+ tokens\); lower "
    with monkeypatch.context() as patch, pytest.raises(OutOfMemoryError, match=single) as error:
        full_above(patch, 0)
        run()
    assert (error.value.reason, error.value.common) == ("out of memory", False)
    optimizer = r"^out of memory in the step of the optimizer; train fewer parameters"
    with monkeypatch.context() as patch, pytest.raises(OutOfMemoryError, match=optimizer):
        patch.setattr(torch.optim.AdamW, "step", lambda *_: (_ for _ in ()).throw(ERRORS[0]))
        run()


def test_evaluation_that_does_not_fit_is_repeated(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial(tasks=TWO, train=WHOLE.model_copy(update={"epochs": 1}))
    trial.run(models, corpus, tmp_path / "whole")
    original, sizes = evaluator.predict, []

    def predict(model: Any, examples: Any) -> Any:
        if len(examples) > 3:
            raise ERRORS[0]
        sizes.append(len(examples))
        return original(model, examples)

    monkeypatch.setattr(evaluator, "predict", predict)
    trial.run(models, corpus, tmp_path / "small")
    assert max(sizes) <= 3
    [(_, small)], [(_, whole)] = history(tmp_path / "small"), history(tmp_path / "whole")
    assert small.keys() == whole.keys()
    assert small["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    monkeypatch.setattr(evaluator, "predict", lambda *_: (_ for _ in ()).throw(ERRORS[0]))
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


def test_workers_restart_with_a_smaller_budget(models: Path, corpus: Shards, tmp_path: Path) -> None:
    """As a group that starts again when one of them fails."""
    with pytest.raises(Exception, match=r"can't allocate memory|Connection"):
        as_two_workers(worker, 2, models, corpus.folder, tmp_path)
    (tmp_path / "rendezvous").unlink()
    as_two_workers(worker, 2, models, corpus.folder, tmp_path)
    assert int((tmp_path / "trial" / "token_budget").read_text()) < 10**6
    assert len(history(tmp_path / "trial")) == 1


def test_out_of_memory_errors_are_recognised() -> None:
    assert all(map(memory.is_out_of_memory, ERRORS))
    assert not memory.is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


def test_base_models_are_cached_while_they_fit(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search over two LLMs loads each once; where only one fits, the other is dropped before the next is loaded."""
    paths = [str(shutil.copytree(models / "llm", tmp_path / name)) for name in "ab"]
    first, second = (load_llm(path, "float32", "cpu") for path in paths)
    assert first is not second
    assert [load_llm(path, "float32", device="cpu") for path in paths] == [first, second]
    assert load_llm(paths[0], "bfloat16", "cpu") is not first

    monkeypatch.setattr(memory, "CACHE_SHARE", 0.0)
    view, dead = shared_view(first), weakref.ref(first)
    del first
    assert load_llm(paths[1], "float32", "cpu") is second, "a cached model needs no more room"
    third = load_llm(paths[0], "float32", "meta")
    gc.collect()
    assert dead() is None, "the view of a trial does not hold the model"
    assert load_llm(paths[0], "float32", "meta") is third
    assert next(view.parameters()).sum().isfinite()
    assert load_llm(paths[1], "float32", "cpu") is not second


def test_forgotten_models_release_their_memory(models: Path) -> None:
    model = weakref.ref(load_llm(str(models / "llm"), "float32", "cpu"))
    gc.collect()
    assert model() is not None, "the trials of a process share it"
    memory.forget_models()
    assert model() is None

"""What `make gpu` measures runs on tiny models without a GPU, and says in one line that there is none."""

import functools
import itertools
import json
from pathlib import Path

import pytest
import torch

from data.shards.dataset import Shards
from sweep.execution import trial
from tests.bench import audio, gpu, on_gpu
from tests.bench.gpu import VARIANTS, Scale, figures
from tests.bench.measure import Row


def test_machine_without_a_gpu_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on_gpu.main() == 2
    printed = capsys.readouterr()
    assert printed.err == "make gpu: this machine has no CUDA device; run it on one with a GPU\n"
    assert printed.out == ""


def test_figures_are_printed_and_recorded_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_gpu, "record", lambda name, rows: (tmp_path / name).write_text(str(len(rows))))
    rows = list[Row]()
    for number, row in enumerate((Row("a", "b", [2.0], 3.0, note="n"), Row("c", "d", note="no GPU")), 1):
        on_gpu.keep(rows, row)
        assert (tmp_path / "gpu").read_text() == str(number)
    assert capsys.readouterr().out == "a, against b: 2 (goal ≥ 3); n\nc, against d: not measured; no GPU\n"


@pytest.mark.long
def test_every_row_is_measured_on_tiny_models(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what needs a package or a GPU, which the row says."""
    monkeypatch.setattr(trial, "compile_layers", functools.partial(trial.compile_layers, backend="eager"))
    monkeypatch.setattr(gpu, "CACHE", tmp_path / "cache")
    scale = Scale("cpu", 64, 1, 1, {"data.shards": str(corpus.folder), "data.history": 2, "model.lora.dropout": 0.0})
    rows = {row.name: row for row in figures(scale, models / "llm", models / "hubert-layer")}
    unmeasured = {name for name, row in rows.items() if not row.runs}
    assert unmeasured <= {"step, 4-bit base", "step, kernels of Liger"}
    assert all(rows[name].note for name in unmeasured)
    assert {f"step, {name}" for name in VARIANTS} <= rows.keys()
    monkeypatch.setattr(on_gpu, "PROFILE", tmp_path / "profiles" / "step.json")
    [row] = on_gpu.profile_rows(scale, models / "llm", models / "hubert-layer")
    assert 0 < row.runs[0] < 2
    [row] = on_gpu.option_rows(scale, dict(itertools.islice(audio.variants().items(), 2)))
    assert (row.name, len(row.runs)) == ("seconds of a step, Qwen2-Audio, from the cache", 1)
    kernels = json.loads(on_gpu.PROFILE.read_text())["kernels"]
    assert 0.5 < sum(kernel["share"] for kernel in kernels) <= 1.001


@pytest.mark.long
def test_sweep_of_make_gpu_survives_a_kill(models: Path, corpus: Shards) -> None:
    changed = {"data.shards": str(corpus.folder), "data.history": 2, "resources.cpus_per_worker": 1}
    row = on_gpu.sweep_row(models / "llm", changed)
    assert row.met
    assert row.note.startswith("1 worker killed")

"""The adapter: the number of embeddings of a clip, the frames that they depend on, and files of initial weights."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from data.config import DataConfig, TaskWeights
from data.errors import ConfigError
from data.loading.examples import Example
from data.loading.tasks import AnswerSet
from data.shards.dataset import Shards
from model.checkpoints import checkpoint
from model.config import AdapterConfig, TrainConfig
from model.evaluation.split_data import TrialData
from model.speech_llm.adapter import Adapter, load_adapter
from model.speech_llm.speech_llm import SpeechLLM
from model.training.random_state import seed_everything
from model.training.trainer import fit
from tests.conftest import LABELS
from tests.model.common import ANSWERS, build, close, settings

WIDTH_IN, WIDTH_OUT = 3, 5
every_adapter = pytest.mark.parametrize(
    ("kind", "hidden"), [("pool", 0), ("pool", 7), ("stack", 0), ("stack", 7), ("conv", 0), ("conv", 7)]
)


def make(kind: str = "pool", hidden: int = 0, window: int = 4, stride: int = 3, seed: int = 0) -> Adapter:
    torch.manual_seed(seed)
    return Adapter(WIDTH_IN, WIDTH_OUT, AdapterConfig(kind=kind, hidden=hidden, window=window, stride=stride))


def batch(lengths: list[int], fill: float = 0.0) -> tuple[Tensor, list[int]]:
    """Return the frames of clips, with `fill` in the padding."""
    frames_BFD = torch.full((len(lengths), max(lengths), WIDTH_IN), fill)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(row)
        frames_BFD[row, :length] = torch.randn(length, WIDTH_IN, generator=generator)
    return frames_BFD, lengths


def naive(adapter: Adapter, frames_FD: Tensor) -> Tensor:
    """Return the embeddings of one clip, computed window by window."""
    window, stride = adapter.config.window, adapter.config.stride
    if len(frames_FD) < window:
        frames_FD = torch.cat([frames_FD, torch.zeros(window - len(frames_FD), WIDTH_IN)])
    rows = []
    for start in range(0, len(frames_FD) - window + 1, stride):
        inside_WD = frames_FD[start : start + window]
        if adapter.conv is not None:
            vector = torch.einsum("odw,wd->o", adapter.conv.weight, inside_WD) + adapter.conv.bias
            vector = torch.nn.functional.gelu(vector)
        else:
            vector = torch.cat(list(inside_WD)) if adapter.config.kind == "stack" else inside_WD.sum(0) / window
        vector = adapter.linear.weight @ vector + adapter.linear.bias
        if adapter.out is not None:
            vector = adapter.out.weight @ torch.nn.functional.gelu(vector) + adapter.out.bias
        rows.append(vector)
    return torch.stack(rows)


@every_adapter
@pytest.mark.parametrize(("window", "stride"), [(1, 1), (4, 3), (4, 4), (8, 4)])
@torch.no_grad()
def test_embeddings_equal_explicit_windows(kind: str, hidden: int, window: int, stride: int) -> None:
    """A clip below one window included, which is padded with zeros."""
    adapter, lengths = make(kind, hidden, window, stride), [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 25]
    frames_BFD, _ = batch(lengths)
    for row, (embedded, length) in enumerate(zip(adapter(frames_BFD, lengths), lengths, strict=True)):
        assert embedded.shape == (adapter.num_embeddings(length), WIDTH_OUT)
        assert close(embedded, naive(adapter, frames_BFD[row, :length]))


@every_adapter
def test_embeddings_depend_on_the_clip_and_all_its_windows(kind: str, hidden: int) -> None:
    """The content and the amount of padding change nothing, and every frame inside a window matters."""
    adapter, lengths = make(kind, hidden), [4, 5, 6, 7, 9, 14]
    clean, filled = adapter(*batch(lengths)), adapter(*batch(lengths, fill=1e6))
    assert all(map(torch.equal, clean, filled))
    for row, length in enumerate(lengths):
        (alone,) = adapter(batch(lengths)[0][row : row + 1, :length], [length])
        assert close(alone, clean[row])
    frames_BFD, lengths = batch([9, 12])
    frames_BFD.requires_grad_()
    sum(embedded.square().sum() for embedded in adapter(frames_BFD, lengths)).backward()
    used_BF = frames_BFD.grad.abs().sum(-1) > 0
    assert used_BF.tolist() == [[frame < 7 for frame in range(12)], [frame < 10 for frame in range(12)]]


@pytest.mark.parametrize("window", [2, 8, 60])
def test_short_clips_are_counted(window: int, models: Path, corpus: Shards) -> None:
    config = settings(models, "whisper", adapter={"window": window, "stride": 2})
    model = SpeechLLM(config, {"classify": ANSWERS["classify"]}, "meta")
    data = TrialData.open(corpus, model, DataConfig(history=2), ("train", "val"))
    assert model.encoder is not None
    columns = corpus.columns
    frames = [
        model.encoder.num_frames(samples)
        for samples, split in zip(columns["n_samples"], columns["split"], strict=True)
        if samples and split != "test"
    ]
    assert data.short_clips == sum(count < window for count in frames)
    assert data.short_clips == {2: 0, 8: 0, 60: len(frames)}[window]
    text = SpeechLLM(settings(models, modality="text"), {"classify": ANSWERS["classify"]}, "meta")
    assert TrialData.open(corpus, text, DataConfig(history=2), ("train",)).short_clips == 0


def test_clip_of_exactly_one_window_is_not_short(models: Path, examples: list[Example]) -> None:
    model = SpeechLLM(settings(models, "whisper", adapter={"window": 10, "stride": 5}), ANSWERS, "meta")
    assert not model.measure(examples[0], 10 * 320).short_clip
    assert model.measure(examples[0], 9 * 320).short_clip


def saved(adapter: Adapter, folder: Path, form: str) -> str:
    """Save the adapter's tensors and return the path."""
    tensors = {name: tensor.contiguous() for name, tensor in adapter.state_dict().items()}
    prefixed = {f"adapter.{name}": tensor for name, tensor in tensors.items()}
    path = folder / ("adapter.safetensors" if form.startswith("safetensors") else "adapter.pt")
    if form.startswith("safetensors"):
        save_file(prefixed if form.endswith("prefixed") else tensors, path)
    elif form == "checkpoint":
        others = {"llm.x.lora_A.default.weight": torch.ones(2), "encoder.model.adapter.weight": torch.ones(2)}
        torch.save({"tensors": prefixed | others, "progress": {}, "parents": []}, path)
    else:
        torch.save(prefixed if form.endswith("prefixed") else tensors, path)
    return str(path)


def refusal(adapter: Adapter, path: str | Path, partial: bool = False) -> str:
    """Return the message, one line, with which a file is refused."""
    with pytest.raises(ConfigError) as error:
        load_adapter(adapter, str(path), partial)
    message = str(error.value)
    assert message.startswith("model.adapter.init_from: ")
    assert "\n" not in message
    return message.removeprefix("model.adapter.init_from: ")


@pytest.mark.parametrize("form", ["safetensors", "safetensors-prefixed", "torch", "torch-prefixed", "checkpoint"])
def test_weights_are_read_from_every_kind_of_file(form: str, tmp_path: Path) -> None:
    for kind in ("pool", "stack", "conv"):
        source, adapter = make(kind, hidden=7, seed=1), make(kind, hidden=7, seed=2)
        path, tensors = saved(source, tmp_path, form), source.state_dict()
        names, report = load_adapter(adapter, path, partial=False)
        assert names == tensors.keys()
        assert report == f"{path}: {len(tensors)} of {len(tensors)} tensors matched; missing: none; unexpected: none"
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in adapter.state_dict().items())


@pytest.mark.parametrize(
    ("source", "target", "report"),
    [
        (("conv", 0), ("pool", 0), "2 of 2 tensors matched; missing: none; unexpected: conv.bias, conv.weight"),
        (("pool", 0), ("conv", 0), "2 of 4 tensors matched; missing: conv.bias, conv.weight; unexpected: none"),
        (
            ("conv", 0),
            ("pool", WIDTH_OUT),
            "2 of 4 tensors matched; missing: out.bias, out.weight; unexpected: conv.bias, conv.weight",
        ),
    ],
)
def test_partial_match_is_reported_and_must_be_allowed(source: Any, target: Any, report: str, tmp_path: Path) -> None:
    lender, adapter = make(*source, seed=1), make(*target, seed=2)
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    path = saved(lender, tmp_path, "checkpoint")
    advice = "use a file of this adapter, or allow it with model.adapter.init_partial=true"
    assert refusal(adapter, path) == f"{path}: {report}; {advice}"
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())
    assert load_adapter(adapter, path, partial=True) == ({"linear.weight", "linear.bias"}, f"{path}: {report}")
    kept = before | {name: lender.state_dict()[name] for name in ("linear.weight", "linear.bias")}
    assert all(torch.equal(tensor, kept[name]) for name, tensor in adapter.state_dict().items())


@pytest.mark.parametrize("partial", [True, False])
def test_files_that_do_not_fit_are_refused(partial: bool, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"head.weight": torch.ones(2)}, path)
    message = refusal(make(), path, partial)
    assert "0 of 2 tensors matched; missing: linear.bias, linear.weight; unexpected: head.weight; use a file" in message
    assert "init_partial" not in message
    wide = saved(Adapter(WIDTH_IN + 1, WIDTH_OUT, AdapterConfig(window=4, stride=3)), tmp_path, "safetensors")
    expected = f"linear.weight is [5, 4] in {wide}, and this adapter needs [5, 3];"
    assert refusal(make(), wide, partial).startswith(expected)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (self.mark.touch, ())


@pytest.mark.parametrize("name", ["adapter.pt", "adapter.safetensors"])
def test_unreadable_files_are_refused_and_run_no_code(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    assert refusal(make(), path) == f"{path}: no such file"
    path.write_bytes(b"half a file")
    assert refusal(make(), path).startswith(f"{path}: not a file of tensors (")
    torch.save({"linear.weight": Evil(tmp_path / "ran")}, path)
    assert refusal(make(), path, partial=True).startswith(f"{path}: not a file of tensors (")
    assert not (tmp_path / "ran").exists()
    path.unlink()
    path.mkdir()
    assert refusal(make(), path).startswith(f"{path}: not a file of tensors (")
    shutil.rmtree(path)
    if path.suffix == ".pt":
        for content in ([1, 2], {"tensors": torch.ones(1)}, {"epoch": 3}):
            torch.save(content, path)
            assert "0 of 2 tensors matched" in refusal(make(), path)


def test_checkpoint_of_a_trial_lends_its_adapter(models: Path, corpus: Shards, tmp_path: Path) -> None:
    """The other parts of the checkpoint are ignored."""
    config = settings(models, "whisper")
    seed_everything(0)
    first = SpeechLLM(config, {"classify": AnswerSet(LABELS, (1, 1, 1))})
    data = TrialData.open(corpus, first, DataConfig(history=2), ("train", "val"))
    fit(first, data, TrainConfig(epochs=1), TaskWeights(), 0, tmp_path, lambda epoch, metrics: None)
    path = tmp_path / checkpoint.FILE
    seed_everything(1)
    changed = {"adapter": {"init_from": str(path)}, "trainable": "lora+tokens"}
    second = SpeechLLM(settings(models, "whisper", **changed), ANSWERS)
    assert first.adapter is not None
    assert second.adapter is not None
    for name, tensor in first.adapter.state_dict().items():
        assert torch.equal(second.adapter.state_dict()[name], tensor)
    assert second.sources["adapter"] == f"{path}: 2 of 2 tensors matched; missing: none; unexpected: none"
    assert not torch.equal(second.cls, first.cls)


@pytest.mark.parametrize(("kind", "hidden"), [("pool", 0), ("stack", 8), ("conv", 8)])
@torch.no_grad()
def test_model_makes_as_many_embeddings_as_planned(
    kind: str, hidden: int, models: Path, examples: list[Example]
) -> None:
    model = build(models, adapter={"kind": kind, "hidden": hidden, "window": 20, "stride": 4})
    assert model.encoder is not None
    assert model.adapter is not None
    counts = [len(clip_TE) for clip_TE in model.clips(examples)]
    frames = [model.encoder.num_frames(len(example.pcm)) for example in examples]
    assert counts == list(map(model.adapter.num_embeddings, frames))
    assert counts[0] == 1 < counts[-1]

"""The adapter: how many embeddings a clip gives, from which frames, and where its weights may come from."""

import itertools
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

KINDS = ("pool", "stack", "conv")
WIDTH_IN, WIDTH_OUT = 3, 5

every_adapter = pytest.mark.parametrize(("kind", "hidden"), list(itertools.product(KINDS, (0, 7))))


def adapter(kind: str = "pool", hidden: int = 0, window: int = 4, stride: int = 3, seed: int = 0) -> Adapter:
    torch.manual_seed(seed)
    return Adapter(WIDTH_IN, WIDTH_OUT, AdapterConfig(kind=kind, hidden=hidden, window=window, stride=stride))


def batch(lengths: list[int], fill: float = 0.0) -> tuple[Tensor, Tensor]:
    """Frames of clips, with `fill` in the padding."""
    frames_BFD = torch.full((len(lengths), max(lengths), WIDTH_IN), fill)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(row)
        frames_BFD[row, :length] = torch.randn(length, WIDTH_IN, generator=generator)
    return frames_BFD, torch.tensor(lengths)


def naive(own: Adapter, frames_FD: Tensor) -> Tensor:
    """The embeddings of one clip, window by window."""
    config = own.config
    window, stride = config.window, config.stride
    if len(frames_FD) < window:
        frames_FD = torch.cat([frames_FD, torch.zeros(window - len(frames_FD), WIDTH_IN)])
    rows = []
    for start in range(0, len(frames_FD) - window + 1, stride):
        inside_WD = frames_FD[start : start + window]
        if own.conv is not None:
            vector = torch.einsum("odw,wd->o", own.conv.weight, inside_WD) + own.conv.bias
            vector = torch.nn.functional.gelu(vector)
        else:
            vector = torch.cat(list(inside_WD)) if config.kind == "stack" else inside_WD.sum(0) / window
        vector = own.linear.weight @ vector + own.linear.bias
        if own.out is not None:
            vector = own.out.weight @ torch.nn.functional.gelu(vector) + own.out.bias
        rows.append(vector)
    return torch.stack(rows)


@every_adapter
@pytest.mark.parametrize(("window", "stride"), [(1, 1), (4, 3), (4, 4), (8, 4)])
@torch.no_grad()
def test_every_clip_gives_what_the_explicit_windows_give(kind: str, hidden: int, window: int, stride: int) -> None:
    own, lengths = adapter(kind, hidden, window, stride), list(range(1, 26))
    frames_BFD, lengths_B = batch(lengths)
    for row, (found, length) in enumerate(zip(own(frames_BFD, lengths_B), lengths, strict=True)):
        assert found.shape == (own.num_embeddings(length), WIDTH_OUT)
        assert close(found, naive(own, frames_BFD[row, :length]))


@every_adapter
@torch.no_grad()
def test_only_frames_within_the_clip_count(kind: str, hidden: int) -> None:
    """What lies beyond a clip that fills a window changes nothing, nor does how much of it there is."""
    own, lengths = adapter(kind, hidden), [4, 5, 6, 7, 9, 14]
    clean, other = own(*batch(lengths)), own(*batch(lengths, fill=1e6))
    assert all(torch.equal(one, two) for one, two in zip(clean, other, strict=True))
    for row, length in enumerate(lengths):
        (alone,) = own(batch(lengths)[0][row : row + 1, :length], torch.tensor([length]))
        assert close(alone, clean[row])


@every_adapter
def test_every_frame_within_a_window_counts(kind: str, hidden: int) -> None:
    own = adapter(kind, hidden)
    frames_BFD, lengths_B = batch([9, 12])
    frames_BFD.requires_grad_()
    sum(embedded.square().sum() for embedded in own(frames_BFD, lengths_B)).backward()
    used_BF = frames_BFD.grad.abs().sum(-1) > 0
    assert used_BF.tolist() == [[place < 7 for place in range(12)], [place < 10 for place in range(12)]]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("pool", [[3.0, 5.0], [7.0, 9.0]]), ("stack", [[1.0, 5.0], [5.0, 9.0]]), ("conv", [[1.0, 7.0], [5.0, 11.0]])],
)
@torch.no_grad()
def test_a_clip_that_can_be_checked_by_hand(kind: str, expected: list[list[float]]) -> None:
    """Four frames of width 2 in windows of two, and one that fills none."""
    frames_FD = torch.tensor([[1.0, 3.0], [5.0, 7.0], [5.0, 7.0], [9.0, 11.0], [0.0, 0.0]])
    own = Adapter(2, 2, AdapterConfig(kind=kind, window=2, stride=2))
    own.linear.bias.zero_()
    # pool: the average. stack: the first value of both frames. conv: the first of the first, the second of the second.
    own.linear.weight.copy_(torch.eye(4)[[0, 2]] if kind == "stack" else torch.eye(2))
    if own.conv is not None:
        own.conv.bias.zero_()
        own.conv.weight.zero_()
        own.conv.weight[0, 0, 0] = own.conv.weight[1, 1, 1] = 1.0
        expected = torch.nn.functional.gelu(torch.tensor(expected)).tolist()
    (found,) = own(frames_FD[None], torch.tensor([5]))
    assert torch.allclose(found, torch.tensor(expected))


@torch.no_grad()
def test_a_clip_below_one_window_is_filled_with_zeros() -> None:
    own = adapter("pool", window=4, stride=2)
    frames_BFD, lengths_B = batch([1, 3])
    short, longer = own(frames_BFD, lengths_B)
    assert len(short) == len(longer) == 1
    assert close(short[0], own.linear(frames_BFD[0, 0] / 4))
    assert close(longer[0], own.linear(frames_BFD[1].sum(0) / 4))


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


def test_a_clip_of_exactly_one_window_is_not_short(models: Path, examples: list[Example]) -> None:
    model = SpeechLLM(settings(models, "whisper", adapter={"window": 10, "stride": 5}), ANSWERS, "meta")
    assert not model.measure(examples[0], 10 * 320).short_clip
    assert model.measure(examples[0], 9 * 320).short_clip


def saved(own: Adapter, folder: Path, form: str) -> Path:
    """The adapter's tensors in a file."""
    tensors = {name: tensor.contiguous() for name, tensor in own.state_dict().items()}
    prefixed = {f"adapter.{name}": tensor for name, tensor in tensors.items()}
    path = folder / ("adapter.safetensors" if form.startswith("safetensors") else "adapter.pt")
    if form.startswith("safetensors"):
        save_file(prefixed if form.endswith("prefixed") else tensors, path)
    elif form == "checkpoint":
        others = {"llm.x.lora_A.default.weight": torch.ones(2), "encoder.model.adapter.weight": torch.ones(2)}
        torch.save({"tensors": prefixed | others, "progress": {}, "parents": []}, path)
    else:
        torch.save(prefixed if form.endswith("prefixed") else tensors, path)
    return path


@every_adapter
@pytest.mark.parametrize("form", ["safetensors", "safetensors-prefixed", "torch", "torch-prefixed", "checkpoint"])
def test_weights_are_read_from_every_kind_of_file(kind: str, hidden: int, form: str, tmp_path: Path) -> None:
    source, own = adapter(kind, hidden, seed=1), adapter(kind, hidden, seed=2)
    path = saved(source, tmp_path, form)
    names, said = load_adapter(own, str(path), partial=False)
    count = len(source.state_dict())
    assert names == source.state_dict().keys()
    assert said == f"{path}: {count} of {count} tensors matched; missing: none; unexpected: none"
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in own.state_dict().items())


@pytest.mark.parametrize("form", ["safetensors", "torch", "checkpoint"])
def test_what_is_left_out_is_said_and_must_be_allowed(form: str, tmp_path: Path) -> None:
    source, own = adapter("conv", hidden=0, seed=1), adapter("pool", hidden=WIDTH_OUT, seed=2)
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    path = str(saved(source, tmp_path, form))
    said = "2 of 4 tensors matched; missing: out.bias, out.weight; unexpected: conv.bias, conv.weight"
    with pytest.raises(ConfigError) as error:
        load_adapter(own, path, partial=False)
    assert str(error.value) == (
        f"model.adapter.init_from: {path}: {said}; use a file of this adapter, or allow it with "
        "model.adapter.init_partial=true"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    names, report = load_adapter(own, path, partial=True)
    assert (names, report) == ({"linear.weight", "linear.bias"}, f"{path}: {said}")
    assert torch.equal(own.linear.weight, source.linear.weight)
    assert torch.equal(own.out.weight, before["out.weight"])


@pytest.mark.parametrize(
    ("source", "own", "said"),
    [
        ("conv", "pool", "2 of 2 tensors matched; missing: none; unexpected: conv.bias, conv.weight"),
        ("pool", "conv", "2 of 4 tensors matched; missing: conv.bias, conv.weight; unexpected: none"),
    ],
)
def test_neither_more_nor_less_goes_unsaid(source: str, own: str, said: str, tmp_path: Path) -> None:
    path = str(saved(adapter(source), tmp_path, "safetensors"))
    with pytest.raises(ConfigError, match=said):
        load_adapter(adapter(own), path, partial=False)
    assert load_adapter(adapter(own), path, partial=True)[1] == f"{path}: {said}"


@pytest.mark.parametrize("partial", [True, False])
def test_a_file_of_which_nothing_fits_is_refused(partial: bool, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"head.weight": torch.ones(2)}, path)
    with pytest.raises(ConfigError, match=r"0 of 2 tensors matched; .* unexpected: head\.weight; use a file of") as e:
        load_adapter(adapter(), str(path), partial)
    assert "init_partial" not in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("partial", [True, False])
def test_another_width_is_refused_by_name(partial: bool, tmp_path: Path) -> None:
    source = Adapter(WIDTH_IN + 1, WIDTH_OUT, AdapterConfig(window=4, stride=3))
    path = saved(source, tmp_path, "safetensors")
    expected = rf"^model\.adapter\.init_from: linear\.weight is \[5, 4\] in {path}, and this adapter needs \[5, 3\];"
    with pytest.raises(ConfigError, match=expected) as error:
        load_adapter(adapter(), str(path), partial)
    assert "\n" not in str(error.value)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (self.mark.touch, ())


@pytest.mark.parametrize("name", ["adapter.pt", "adapter.bin", "adapter.safetensors"])
def test_a_file_cannot_run_code(name: str, tmp_path: Path) -> None:
    torch.save({"linear.weight": Evil(tmp_path / "ran")}, tmp_path / name)
    with pytest.raises(ConfigError, match=r"model\.adapter\.init_from: .*: not a file of tensors \(.*\); use") as error:
        load_adapter(adapter(), str(tmp_path / name), partial=True)
    assert not (tmp_path / "ran").exists()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["adapter.pt", "adapter.safetensors"])
def test_files_that_cannot_be_read_are_one_line(name: str, tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(ConfigError) as error:
            load_adapter(adapter(), str(path), partial=False)
        assert "\n" not in str(error.value)
        return str(error.value)

    path = tmp_path / name
    assert message(path) == f"model.adapter.init_from: {path}: no such file"
    path.write_bytes(b"half a file")
    assert message(path).startswith(f"model.adapter.init_from: {path}: not a file of tensors (")
    path.unlink()
    path.mkdir()
    assert message(path).startswith(f"model.adapter.init_from: {path}: not a file of tensors (")
    if path.suffix == ".pt":
        shutil.rmtree(path)
        for content in ([1, 2], {"tensors": torch.ones(1)}, {"epoch": 3}):
            torch.save(content, path)
            assert "0 of 2 tensors matched" in message(path)


def test_a_trial_lends_its_adapter_to_another(models: Path, corpus: Shards, tmp_path: Path) -> None:
    """By the path of its checkpoint; the parts beside it are none of the adapter's business."""
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
def test_a_model_plans_for_the_embeddings_that_it_makes(
    kind: str, hidden: int, models: Path, examples: list[Example]
) -> None:
    model = build(models, adapter={"kind": kind, "hidden": hidden, "window": 20, "stride": 4})
    assert model.encoder is not None
    assert model.adapter is not None
    found = [len(clip_TE) for clip_TE in model.clips(examples)]
    assert found == [model.adapter.num_embeddings(model.encoder.num_frames(len(example.pcm))) for example in examples]
    assert found[0] == 1 < found[-1]

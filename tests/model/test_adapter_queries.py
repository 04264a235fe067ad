"""Adapters with learned queries and with merged frames: explicit formulas, padding, lengths and refusals."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.config import AugmentConfig, DataConfig
from data.errors import ConfigError, MisfitError
from data.loading.examples import Example
from data.shards.dataset import Shards
from model.config import AdapterConfig
from model.evaluation.split_data import TrialData
from model.speech_llm.adapter import Adapter, cut_into_windows, merge_frames
from model.speech_llm.speech_llm import SpeechLLM
from tests.model.common import ANSWERS, build, close, settings
from tests.model.test_adapter import batch

LENGTHS = [4, 9, 5, 17, 30]
KINDS: dict[str, dict[str, Any]] = {
    "queries over a clip": {"kind": "queries", "queries": 5},
    "queries in windows": {"kind": "queries", "rate": 17.0, "hidden": 6},
    "merged": {"kind": "merge", "rate": 17.0},
}
every_kind = pytest.mark.parametrize("changed", KINDS.values(), ids=KINDS)


def make(changed: dict[str, Any], **more: Any) -> Adapter:
    torch.manual_seed(0)
    return Adapter(3, 5, AdapterConfig.model_validate(changed | more))


@every_kind
@torch.no_grad()
def test_embeddings_depend_on_the_clip_alone(changed: dict[str, Any]) -> None:
    """Neither the amount nor the content of the padding matters; cached features give the same."""
    adapter = make(changed)
    clean, filled = adapter(*batch(LENGTHS)), adapter(*batch(LENGTHS, fill=1e6))
    frames_BFD, _ = batch(LENGTHS)
    clips = [row[:length] for row, length in zip(frames_BFD, LENGTHS, strict=True)]
    projected = adapter.project(clips)
    for index, (clip_FD, length) in enumerate(zip(clips, LENGTHS, strict=True)):
        (alone,) = adapter(clip_FD[None], torch.tensor([length]))
        assert alone.shape == (adapter.num_embeddings(length), 5)
        assert all(close(other[index], alone) for other in (clean, filled, projected))


@every_kind
def test_every_frame_and_every_parameter_takes_part(changed: dict[str, Any]) -> None:
    adapter = make(changed)
    frames_BFD, lengths = batch(LENGTHS)
    frames_BFD.requires_grad_()
    sum(embedded.square().sum() for embedded in adapter(frames_BFD, lengths)).backward()
    used_BF = frames_BFD.grad.abs().sum(-1) > 0
    assert used_BF.tolist() == [[frame < length for frame in range(30)] for length in LENGTHS]
    biases = "key.bias"  # which the softmax takes out again
    assert all(p.grad.abs().max() > 0 for name, p in adapter.named_parameters() if not name.endswith(biases))


def greedy(frames_FD: Tensor, count: int) -> Tensor:
    """Merge the most similar pair of neighbouring frames until `count` runs are left."""
    similarity = [float(F.cosine_similarity(*pair, dim=0)) for pair in pairwise(frames_FD)]
    runs = [[frame] for frame in range(len(frames_FD))]
    for place in sorted(range(len(similarity)), key=lambda index: -similarity[index])[: len(runs) - count]:
        left = next(run for run in runs if place in run)
        right = next(run for run in runs if place + 1 in run)
        left += right
        runs.remove(right)
    return torch.stack([frames_FD[run].mean(0) for run in runs])


@pytest.mark.parametrize("count", [1, 2, 7, 29, 30])
def test_merging_joins_the_most_similar_neighbours(count: int) -> None:
    (frames_FD,), _ = batch([30])
    assert close(merge_frames(frames_FD, count), greedy(frames_FD, count))


def test_equal_frames_merge_in_a_fixed_order() -> None:
    frames_FD = torch.ones(6, 3) * torch.tensor([1.0, 1, 1, 1, 1, 9])[:, None]  # all have the same direction
    assert merge_frames(frames_FD, 3)[:, 0].tolist() == [1, 1, (1 + 1 + 1 + 9) / 4]


def test_windows_share_the_frames_of_a_clip() -> None:
    clips = [torch.arange(7.0)[:, None], torch.arange(10.0, 13.0)[:, None]]
    frames_CWD, valid_CW = cut_into_windows(clips, [3, 1])
    windows = [row[valid, 0].tolist() for row, valid in zip(frames_CWD, valid_CW, strict=True)]
    assert windows == [[0, 1], [2, 3], [4, 5, 6], [10, 11, 12]]


@every_kind
@torch.no_grad()
def test_model_makes_as_many_embeddings_as_planned(
    changed: dict[str, Any], models: Path, examples: list[Example]
) -> None:
    model = build(models, "whisper", adapter=changed)
    assert model.encoder is not None
    assert model.adapter is not None
    counts = [len(clip_TE) for clip_TE in model.clips(examples)]
    frames = [model.encoder.num_frames(len(example.pcm)) for example in examples]
    assert counts == list(map(model.adapter.num_embeddings, frames))
    assert min(counts) > 0


@torch.no_grad()
def test_merging_has_the_same_bits_in_every_batch(
    models: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also above an encoder that trains, whose frames are therefore computed for each clip alone."""
    monkeypatch.setattr(Adapter, "_project", lambda self, merged: merged)
    for trainable in ("encoder+adapter", "adapter", "adapter+encoder.*.layers.1.*"):
        model = build(models, "hubert-group", adapter={"kind": "merge"}, trainable=f"{trainable}+lora+tokens")
        alone = [model.clips([example])[0] for example in examples]
        assert all(map(torch.equal, model.clips(examples[::-1]), alone[::-1]))


@pytest.mark.parametrize("kind", ["queries", "merge"])
def test_rate_that_leaves_no_frame_is_refused(kind: str, models: Path, corpus: Shards) -> None:
    columns = corpus.columns
    used = [row for row, split in enumerate(columns["split"]) if split != "test" and columns["n_samples"][row]]
    shortest = min(used, key=lambda row: columns["n_samples"][row])
    samples = columns["n_samples"][shortest]

    def open_data(rate: float, **augment: Any) -> TrialData:
        config = settings(models, "whisper", adapter={"kind": kind, "rate": rate})
        model = SpeechLLM(config, {"classify": ANSWERS["classify"]}, "meta")
        data = DataConfig(history=2, augment=AugmentConfig(**augment))
        return TrialData.open(corpus, model, data, ("train", "val"))

    with pytest.raises(MisfitError) as refused:
        open_data(0.5)
    named, _, advice = str(refused.value).partition(" set it to at least ")
    assert f"model.adapter.rate 0.5 leaves no frame of its clip of {samples / 16000:.2f} s;" in named
    least = float(advice.partition(",")[0])
    open_data(least)
    with pytest.raises(MisfitError, match="leaves no frame"):
        open_data(least, speeds=(1.0, 1.2))


def test_rate_above_that_of_the_encoder_is_refused(models: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.adapter.rate: 60 embeddings a second are more than the 50 frames"):
        SpeechLLM(settings(models, adapter={"kind": "merge", "rate": 60}), ANSWERS, "meta")


def test_window_settings_do_not_bind_other_kinds(models: Path) -> None:
    config = settings(models, adapter={"kind": "merge", "window": 2, "stride": 4})
    assert config.problems() == []
    assert settings(models, adapter={"window": 2, "stride": 4}).problems() != []

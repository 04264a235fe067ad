"""Frozen encoders and frozen layers: read or computed, alone or beside others, a trial gets the same bits."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.config import DataConfig
from data.loading.examples import Example
from data.loading.feature_files import missing, parts
from data.loading.tasks import answer_sets
from data.shards.dataset import Shards
from model.encoders.frozen_features import CacheKey, Job, clip_features, encoder_digest, pooling, recipe
from model.evaluation.split_data import TrialData
from model.speech_llm.speech_llm import SpeechLLM
from model.training.random_state import seed_everything
from model.training.trainer import fit
from tests.conftest import ENCODERS
from tests.model.common import ANSWERS, build, settings
from tests.model.trials import DATA, NEW, TWO, Trial, same_end

ADAPTERS: dict[str, dict[str, Any]] = {
    "pool": {"kind": "pool", "window": 8, "stride": 4},
    "stack": {"kind": "stack", "window": 4, "stride": 3},
    "conv": {"kind": "conv", "window": 6, "stride": 2, "hidden": 16},
}
SHORT = Trial().train.model_copy(update={"epochs": 1})
UPPER = f"encoder.*.layers.1.*+{NEW}"


def computed(trial: Trial, models: Path, shards: Shards, root: Path) -> Path:
    """The folder with the features of a trial."""
    config, answers = trial.config(models), answer_sets(shards, trial.tasks.active())
    made = recipe(config, trial.data, "cpu", SpeechLLM(config, answers, "meta").frozen_layers)
    folder = root / made.key
    for part in missing(folder, shards, trial.data):
        told = Job(shards, part, trial.data, {folder: made}, 1)().to_pylist()
        assert told[0]["size"] == part.size
        assert told[0]["bytes"] > 0
    return folder


def train(trial: Trial, models: Path, shards: Shards, folder: Path, features: Path | None) -> SpeechLLM:
    seed_everything(trial.seed)
    answers = answer_sets(shards, trial.tasks.active())
    model = SpeechLLM(trial.config(models), answers, encodes=features is None)
    data = TrialData.open(shards, model, trial.data, ("train", "val"), features=features)
    fit(model, data, trial.train, trial.tasks, trial.seed, folder, lambda epoch, metrics: None)
    return model


@pytest.mark.parametrize(
    "trial",
    [
        *(Trial(model={"adapter": adapter}, train=SHORT) for adapter in ADAPTERS.values()),
        Trial("hubert-layer", {"lora": {"dropout": 0.2}, "modality": "text+speech"}, tasks=TWO, train=SHORT),
        Trial("wav2vec2-group", {"precision": "bfloat16"}, train=SHORT),
        Trial("w2v-bert", {"encoder": {"dtype": "bfloat16"}}, train=SHORT),
        Trial(model={"trainable": UPPER}),
        Trial("wavlm-group", {"trainable": UPPER, "precision": "bfloat16"}, train=SHORT),
        Trial(data=DataConfig(history=1, sound="shuffled"), train=SHORT),
        Trial(data=DataConfig(history=1, sound="noisy", snr_db=3.0), train=SHORT),
        Trial(data=DataConfig(history=1, sound="zeroed"), train=SHORT),
    ],
    ids=[
        *ADAPTERS,
        "hubert",
        "mixed precision",
        "bfloat16",
        "upper layers",
        "upper, mixed",
        "shuffled",
        "noisy",
        "zeroed",
    ],
)
def test_a_trial_ends_with_the_same_bits_with_and_without_files(
    trial: Trial, models: Path, corpus: Shards, tmp_path: Path
) -> None:
    features = computed(trial, models, corpus, tmp_path / "features")
    train(trial, models, corpus, tmp_path / "live", None)
    train(trial, models, corpus, tmp_path / "read", features)
    assert same_end(tmp_path / "live", tmp_path / "read")


def test_the_files_are_what_is_read(models: Path, corpus: Shards, tmp_path: Path) -> None:
    """Else the test above would compare a trial with itself."""
    trial = Trial(train=SHORT)
    features = computed(trial, models, corpus, tmp_path / "features")
    model = train(trial, models, corpus, tmp_path / "read", features)
    assert model.encoder is not None
    assert all(parameter.is_meta for parameter in model.encoder.parameters())
    silent = DataConfig(history=DATA.history, sound="zeroed")
    other = computed(replace(trial, data=silent), models, corpus, tmp_path)
    for part, wrong in zip(parts(corpus, trial.data), parts(corpus, silent), strict=True):
        shutil.copy(other / wrong.name, features / part.name)
    train(trial, models, corpus, tmp_path / "wrong", features)
    assert not same_end(tmp_path / "read", tmp_path / "wrong")


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_a_clip_has_the_same_features_beside_any_others(
    models: Path, examples: list[Example], adapter: dict[str, Any]
) -> None:
    model = build(models, "wav2vec2-group", trainable=NEW, adapter=adapter)
    heard = [example for example in examples if example.pcm is not None]
    rows = [model._frozen_features(example) for example in heard]
    assert all(torch.equal(row, model._frozen_features(example)) for row, example in zip(rows, heard, strict=True))
    assert all(torch.equal(row, row.half().float()) for row in rows)
    assert model.encoder is not None
    assert model.adapter is not None
    for row, example in zip(rows, heard, strict=True):
        assert example.pcm is not None
        frames = model.encoder.num_frames(len(example.pcm))
        assert len(row) == (model.adapter.num_embeddings(frames) if adapter["kind"] == "pool" else frames)
    # What is learnt from them is the adapter's own forward pass, but for the rounding.
    with torch.no_grad():
        projected = model.clips(heard)
        for clip_TE, example in zip(projected, heard, strict=True):
            [plain_TE] = model._encode([example])
            assert clip_TE.shape == plain_TE.shape
            assert (clip_TE - plain_TE).abs().max() <= 2e-3 * plain_TE.abs().max()


def test_the_layers_above_frozen_ones_train_on_what_is_kept(models: Path, examples: list[Example]) -> None:
    model = build(models, trainable=UPPER).train()
    assert model.encoder is not None
    heard = examples[:3]
    clips = model.clips(heard)
    torch.cat(clips).square().mean().backward()
    given = {name for name, parameter in model.encoder.named_parameters() if parameter.grad is not None}
    assert given == {name for name, _ in model.encoder.named_parameters() if ".layers.1." in name}
    kept = [clip_features(model.encoder, example.pcm, [(1, None)])[0] for example in heard if example.pcm is not None]
    assert all(features.dtype == torch.float16 for features in kept)
    read = [
        replace(example, pcm=None, features=features.numpy(), n_samples=0 if example.pcm is None else len(example.pcm))
        for example, features in zip(heard, kept, strict=True)
    ]
    assert all(map(torch.equal, model.clips(read), clips))
    [plain] = build(models, trainable=f"encoder+{NEW}").clips(heard[:1])
    assert 0 < (clips[0] - plain).abs().max() <= 2e-3 * plain.abs().max()
    assert model.measure(heard[0], 9000).cost.frames == 27  # of what trains: they are computed in batches


@pytest.mark.parametrize(
    ("kind", "chosen", "layers"),
    [
        *((kind, "encoder.*.layers.1.*", 1) for kind in ENCODERS),
        ("hubert-layer", "encoder", 0),
        ("whisper", "encoder", 0),
        ("whisper", "encoder.*.layers.*", 0),
        ("whisper", "encoder.*.layers.1.*+encoder.model.layer_norm.*", 1),
        ("hubert-layer", "encoder.model.encoder.layer_norm.*", 2),  # the last norm of all
        ("hubert-group", "encoder.model.encoder.layer_norm.*", 0),  # the one before the first layer
        ("wav2vec2-group", "encoder.*.layers.1.*+encoder.*.pos_conv_embed.*", 0),
        ("wavlm-layer", "encoder.*.layers.1.*+encoder.*.rel_attn_embed.*", 0),  # of the first layer, for all
        ("w2v-bert", "encoder.*.layers.1.*+encoder.*.masked_spec_embed", 0),
        ("hubert-layer", "encoder.*.layers.1.attention.*", 1),
        ("hubert-layer", "adapter", 0),
    ],
)
def test_the_layers_below_all_that_trains_are_frozen(kind: str, chosen: str, layers: int, models: Path) -> None:
    def frozen(**encoder: float) -> int:
        config = settings(models, kind, trainable=f"{chosen}+{NEW}", encoder={"path": str(models / kind), **encoder})
        return SpeechLLM(config, ANSWERS, "meta").frozen_layers

    assert frozen() == layers
    if layers == 1 and kind == "whisper":  # what is drawn in them changes from epoch to epoch
        assert (frozen(dropout=0.1), frozen(spec_augment=0.1)) == (0, 0)


def test_an_encoder_that_trains_is_not_rounded(models: Path, examples: list[Example]) -> None:
    frozen, tuned = (build(models, trainable=parts) for parts in (NEW, f"encoder+{NEW}"))
    heard = [example for example in examples if example.pcm is not None]
    with torch.no_grad():
        assert torch.equal(torch.cat(frozen._encode(heard[:1])), torch.cat(tuned.clips(heard[:1])))
        assert not torch.equal(torch.cat(frozen.clips(heard[:1])), torch.cat(tuned.clips(heard[:1])))
    assert (frozen.measure(heard[0], 9000).cost.frames, tuned.measure(heard[0], 9000).cost.frames) == (0, 27)


def test_a_key_names_all_that_features_depend_on_and_nothing_else(models: Path, tmp_path: Path) -> None:
    def key(data: DataConfig | None = None, device: str = "cpu", layers: int = 0, **changed: Any) -> str:
        return recipe(settings(models, **changed), data or DataConfig(), device, layers).key

    same = [
        key(),
        key(lora={"rank": 16}),
        key(DataConfig(history=3)),
        key(DataConfig(sound="shuffled")),
        key(DataConfig(snr_db=7.0)),
        key(adapter={"hidden": 32}),
    ]
    assert len(set(same)) == 1
    assert len({key(layers=2), key(layers=2, adapter={"stride": 2}), key(layers=1), *same}) == 3
    others = [
        key(DataConfig(sound="zeroed")),
        key(DataConfig(sound="noisy")),
        key(DataConfig(sound="noisy", snr_db=7.0)),
        key(device="cuda"),
        key(precision="bfloat16"),
        key(adapter={"stride": 2}),
        key(adapter={"kind": "conv"}),
        key(encoder={"path": str(models / "whisper")}),
        key(encoder={"path": str(models / "hubert-layer"), "dtype": "bfloat16"}),
    ]
    assert len({*same, *others}) == 10
    assert key(adapter={"kind": "conv"}) == key(adapter={"kind": "stack", "window": 2, "stride": 2})  # frames as such
    assert pooling(settings(models, adapter={"kind": "stack"})) is None
    assert isinstance(recipe(settings(models), DataConfig(), "cpu"), CacheKey)


def test_an_encoder_is_known_by_its_weights_and_settings_wherever_it_lies(models: Path, tmp_path: Path) -> None:
    source = models / "hubert-layer"
    shutil.copytree(source, tmp_path / "copy")
    assert encoder_digest(str(tmp_path / "copy")) == encoder_digest(str(source))
    shutil.copytree(source, tmp_path / "weights")
    tensors = load_file(tmp_path / "weights" / "model.safetensors")
    name = min(tensors)
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, tmp_path / "weights" / "model.safetensors", {"format": "pt"})
    shutil.copytree(source, tmp_path / "settings")
    path = tmp_path / "settings" / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"do_normalize": true', '"do_normalize": false'))
    digests = {encoder_digest(str(tmp_path / name)) for name in ("copy", "weights", "settings")}
    assert len(digests) == 3

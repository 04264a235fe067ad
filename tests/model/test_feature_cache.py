"""Encoder features and teacher logits: a trial gets the same bits whether it reads them from files or computes them."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.config import DataConfig
from data.corpus import synthetic
from data.loading.cached_arrays import CacheFolders
from data.loading.examples import Example
from data.loading.feature_files import feature_files
from data.loading.tasks import answer_sets
from data.loading.teacher_files import TeacherLogits, teacher_files
from data.preparation.build import prepare
from data.shards.dataset import Shards
from model.config import LossConfig, ModelConfig
from model.encoders.base import OUTPUT
from model.encoders.frozen_features import (
    FeatureJob,
    FeatureKey,
    FeatureSpec,
    clip_features,
    encoder_digest,
    feature_key,
    feature_specs,
)
from model.evaluation.split_data import TrialData
from model.objectives import teacher
from model.objectives.losses import answer_losses
from model.objectives.teacher import (
    TeacherJob,
    TeacherKey,
    llm_digest,
    run_teacher,
    teacher_input,
    teacher_key,
    top_log_probs,
)
from model.speech_llm.language_model import load_llm
from model.speech_llm.speech_llm import SpeechLLM
from model.training.random_state import seed_everything
from model.training.trainer import fit
from tests.model.common import ANSWERS, bases, build, settings
from tests.model.losses import mixed
from tests.model.trials import NEW, TWO, Trial, same_end
from tests.tiny_models import ENCODERS

ADAPTERS: dict[str, dict[str, Any]] = {
    "pool": {"kind": "pool", "window": 8, "stride": 4},
    "stack": {"kind": "stack", "window": 4, "stride": 3},
    "conv": {"kind": "conv", "window": 6, "stride": 2, "hidden": 16},
    "queries": {"kind": "queries"},
    "merge": {"kind": "merge", "hidden": 16},
}
SHORT = Trial().train.model_copy(update={"epochs": 1})
DISTILLED = SHORT.model_copy(update={"losses": LossConfig(distillation=0.5, temperature=2.0)})
SMALL = DISTILLED.model_copy(update={"token_budget": 60})
UPPER = f"encoder.*.layers.1.*+{NEW}"
TEXT = {"modality": "text", "trainable": "lora+tokens"}
MIXED = {"precision": "bfloat16"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Six short dialogues: two or three steps an epoch."""
    return prepare(synthetic.corpus(sessions=6, turns=4, seed=3), tmp_path_factory.mktemp("corpus") / "shards")


def precompute(trial: Trial, config: ModelConfig, shards: Shards, root: Path) -> CacheFolders:
    """Compute all that a trial may read from the cache."""
    model, features, logits = SpeechLLM(config, answer_sets(shards, trial.tasks.active()), "meta"), (), None
    if config.uses_audio:
        keys = [feature_key(config, trial.data, "cpu", spec) for spec in model.feature_specs]
        folders = {root / key.key: key for key in keys}
        features = tuple(folders)
        for file in feature_files(shards, trial.data):
            FeatureJob(file, folders, 1, shards, trial.data)()
    if trial.train.losses.distillation:
        key, tasks = teacher_key(config, trial.train.losses.temperature, "cpu"), list(model.tasks)
        logits = root / key.key
        inputs = teacher.teacher_inputs(model.prompt_builder, model.max_positions, shards, trial.data, tasks)
        for part in teacher_files(shards, inputs):
            TeacherJob(part, {logits: key}, 1, inputs)()
    return CacheFolders(features, logits)


def train(trial: Trial, config: ModelConfig, shards: Shards, folder: Path, cached: CacheFolders) -> SpeechLLM:
    seed_everything(trial.seed)
    model = SpeechLLM(config, answer_sets(shards, trial.tasks.active()), encodes=not cached.features)
    has_teacher = trial.train.losses.distillation > 0
    data = TrialData.open(shards, model, trial.data, ("train", "val"), "local", teacher=has_teacher, **cached._asdict())
    fit(model, data, trial.train, trial.tasks, trial.seed, folder, lambda epoch, metrics: None)
    return model


@pytest.mark.parametrize(
    "trial",
    [
        Trial(model={"adapter": ADAPTERS["pool"]}, data=DataConfig(history=1, sound="zeroed"), train=SHORT),
        Trial("wav2vec2-group", {"adapter": ADAPTERS["stack"]} | MIXED, data=DataConfig(sound="shuffled"), train=SHORT),
        Trial(model={"adapter": ADAPTERS["conv"]}, data=DataConfig(history=1, sound="noisy", snr_db=3.0), train=SHORT),
        Trial("hubert-layer", {"lora": {"dropout": 0.2}, "modality": "text+speech"}, TWO, DISTILLED),
        Trial("w2v-bert", {"encoder": {"dtype": "bfloat16"}}, train=SHORT),
        Trial(model={"trainable": UPPER, "modality": "speech"}, train=DISTILLED),
        Trial("wavlm-group", {"trainable": UPPER} | MIXED, train=SHORT),
        Trial("hubert-group", {"encoder": {"layers": "weighted"}}, train=SHORT),
        Trial("hubert-group", {"encoder": {"lora": {"rank": 2, "layers": 1}}, "trainable": "new"}, train=SHORT),
        Trial(model={"trainable": UPPER, "encoder": {"layers": [0, 1, 2]}, "adapter": ADAPTERS["merge"]}, train=SHORT),
        Trial("qwen2-audio", train=DISTILLED),
        Trial("granite-speech", {"trainable": UPPER}, train=SHORT),
        Trial(model=TEXT | MIXED | {"llm": {"dtype": "bfloat16"}}, data=DataConfig(last_text="omitted"), train=SMALL),
    ],
    ids=[
        "zeroed",
        "shuffled",
        "noisy",
        "hubert",
        "w2v-bert",
        "upper",
        "upper mixed",
        "layers",
        "encoder LoRA",
        "upper layers",
        "Qwen2-Audio",
        "Granite Speech",
        "teacher mixed",
    ],
)
def test_trial_is_equal_with_and_without_cache(
    trial: Trial, models: Path, shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = bases(models, trial.kind)["llm"] | trial.model.get("llm", {})
    config = replace(trial, model=trial.model | {"llm": llm}).config(models)
    cached = precompute(trial, config, shards, tmp_path)
    train(trial, config, shards, tmp_path / "live", CacheFolders())
    monkeypatch.setattr(teacher, "run_teacher", lambda *_, **__: pytest.fail("the teacher runs in spite of the cache"))
    model = train(trial, config, shards, tmp_path / "read", cached)
    if model.encoder is not None and not model.frozen_layers:  # the features can come from nowhere else
        assert all(parameter.is_meta for parameter in model.encoder.parameters())
    assert same_end(tmp_path / "live", tmp_path / "read")


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_clip_features_do_not_depend_on_the_batch(
    models: Path, examples: list[Example], adapter: dict[str, Any]
) -> None:
    model = build(models, "wav2vec2-group", trainable=NEW, adapter=adapter)
    assert model.encoder is not None
    assert model.adapter is not None
    clips = [(example, example.pcm) for example in examples if example.pcm is not None]
    projected = model.clips([example for example, _ in clips])
    for (example, pcm), clip_TE in zip(clips, projected, strict=True):
        [features] = model._frozen_features(example)
        assert torch.equal(features, model._frozen_features(example)[0])
        assert torch.equal(features, features.half().float())
        frames = model.encoder.num_frames(len(pcm))
        assert len(features) == (model.adapter.num_embeddings(frames) if adapter["kind"] == "pool" else frames)
        # The adapter projects them as in its own forward pass, apart from the rounding.
        [plain_TE] = model._encode([example])
        assert clip_TE.shape == plain_TE.shape
        assert (clip_TE - plain_TE).abs().max() <= 2e-3 * plain_TE.abs().max()


def test_upper_layers_train_on_cached_lower_layers(models: Path, examples: list[Example]) -> None:
    model = build(models, trainable=UPPER).train()
    assert model.encoder is not None
    batch = examples[:3]
    clips = model.clips(batch)
    torch.cat(clips).square().mean().backward()
    trained = {name for name, parameter in model.encoder.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.encoder.named_parameters() if ".layers.1." in name}
    cached = []
    for example in batch:
        assert example.pcm is not None
        [features] = clip_features(model.encoder, example.pcm, [FeatureSpec(1)])
        assert features.dtype == torch.float16
        cached.append(replace(example, pcm=None, features=(features.numpy(),), n_samples=len(example.pcm)))
    assert all(map(torch.equal, model.clips(cached), clips))
    [plain] = build(models, trainable=f"encoder+{NEW}").clips(batch[:1])
    assert 0 < (clips[0] - plain).abs().max() <= 2e-3 * plain.abs().max()
    assert model.measure(batch[0], 9000).cost.frames == 27  # the layers that train compute them in batches


@pytest.mark.parametrize(
    ("kind", "chosen", "layers"),
    [
        *((kind, "encoder.*.layers.1.*", 1) for kind in ENCODERS),
        ("hubert-layer", "encoder", 0),
        ("whisper", "encoder", 0),
        ("whisper", "encoder.*.layers.*", 0),
        ("whisper", "encoder.*.layers.1.*+encoder.model.layer_norm.*", 1),
        ("hubert-layer", "encoder.model.encoder.layer_norm.*", 2),  # the norm after the last layer
        ("hubert-group", "encoder.model.encoder.layer_norm.*", 0),  # the norm before the first layer
        ("wav2vec2-group", "encoder.*.layers.1.*+encoder.*.pos_conv_embed.*", 0),
        ("wavlm-layer", "encoder.*.layers.1.*+encoder.*.rel_attn_embed.*", 0),  # of the first layer, used by all
        ("w2v-bert", "encoder.*.layers.1.*+encoder.*.masked_spec_embed", 0),
        ("hubert-layer", "encoder.*.layers.1.attention.*", 1),
        ("hubert-layer", "adapter", 0),
    ],
)
def test_frozen_layers_are_below_all_that_trains(kind: str, chosen: str, layers: int, models: Path) -> None:
    def frozen(**encoder: float) -> int:
        config = settings(models, kind, trainable=f"{chosen}+{NEW}", encoder={"path": str(models / kind), **encoder})
        return SpeechLLM(config, ANSWERS, "meta").frozen_layers

    assert frozen() == layers
    if layers == 1 and kind == "whisper":  # random masks change the features in every epoch
        assert (frozen(dropout=0.1), frozen(spec_augment=0.1)) == (0, 0)


def test_encoder_that_trains_is_not_rounded(models: Path, examples: list[Example]) -> None:
    frozen, tuned = (build(models, trainable=parts) for parts in (NEW, f"encoder+{NEW}"))
    [example] = [example for example in examples if example.pcm is not None][:1]
    with torch.no_grad():
        assert torch.equal(frozen._encode([example])[0], tuned.clips([example])[0])
        assert not torch.equal(frozen.clips([example])[0], tuned.clips([example])[0])
    assert (frozen.measure(example, 9000).cost.frames, tuned.measure(example, 9000).cost.frames) == (0, 27)


@torch.no_grad()
def test_teacher_logits_do_not_depend_on_the_batch(models: Path, examples: list[Example]) -> None:
    """The losses are equal to the bit with and without cached logits, also if only a part of a batch has them."""
    model, config = build(models), LossConfig(distillation=1.0)
    llm, live = load_llm(str(models / "llm"), "float32", "cpu"), mixed(examples)
    cached = []
    for example in live:
        read = teacher_input(model.prompt_builder, example)
        ids, log_probs = top_log_probs(run_teacher(llm, read)[0], 1.0)
        cached.append(replace(example, teacher_logits=TeacherLogits(ids.numpy(), log_probs.numpy())))
    for chosen in (slice(0, 1), slice(2, 5), slice(None, None, -1)):
        losses = [answer_losses(model, batch[chosen], config).distillation_B for batch in (live, cached)]
        assert torch.equal(*losses)
    whole = [answer_losses(model, batch, config).distillation_B for batch in (live, [*live[:3], *cached[3:]])]
    assert torch.equal(*whole)
    with_hidden = LossConfig(distillation=1.0, hidden=1.0)  # hidden states are never cached
    sums = [answer_losses(model, batch, with_hidden).weighted_sum(with_hidden) for batch in (live, cached)]
    assert torch.equal(*sums)


def test_teacher_predicts_the_tokens_of_the_model(models: Path, examples: list[Example]) -> None:
    model = build(models, cls="after", modality="text+speech")
    for example in mixed(examples):
        read, answer = teacher_input(model.prompt_builder, example), model.answer(example)
        targets = [target for target in answer.targets if target >= 0]
        assert read.predicted == len(targets) == answer.predicted
        assert read.ids[len(read.ids) - read.predicted + 1 :].tolist() == targets[:-1]
        assert (read.ids >= 0).all()


def test_feature_key_covers_exactly_what_features_depend_on(models: Path) -> None:
    def key(
        data: Mapping[str, Any] | None = None, device: str = "cpu", layers: int = 0, state: int = OUTPUT, **changed: Any
    ) -> str:
        model = settings(models, **changed)
        spec = feature_specs(model, [state], layers)[0]
        return feature_key(model, DataConfig.model_validate(data or {}), device, spec).key

    same = [
        *(key(), key(lora={"rank": 16}), key(adapter={"hidden": 32})),
        *(key({"history": 3}), key({"sound": "shuffled"}), key({"snr_db": 7.0})),
    ]
    assert len(set(same)) == 1
    assert len({key(layers=2), key(layers=2, adapter={"stride": 2}), key(layers=1), *same}) == 3
    noisy, hubert = {"sound": "noisy"}, str(models / "hubert-layer")
    others = [
        *(key({"sound": "zeroed"}), key(noisy), key(noisy | {"snr_db": 7.0}), key(device="cuda"), key(**MIXED)),
        *(key(adapter={"stride": 2}), key(adapter={"kind": "conv"}), key(state=0), key(state=1)),
        *(key(encoder={"path": str(models / "whisper")}), key(encoder={"path": hubert, "dtype": "bfloat16"})),
    ]
    assert len({*same, *others}) == 12
    assert key(adapter={"kind": "conv"}) == key(adapter={"kind": "stack", "window": 2, "stride": 2})  # plain frames


def test_teacher_key_covers_exactly_what_logits_depend_on(models: Path) -> None:
    def key(temperature: float = 1.0, device: str = "cpu", **changed: Any) -> str:
        return teacher_key(settings(models, **changed), temperature, device).key

    same = [key(), key(lora={"rank": 16}), key(modality="speech"), key(cls="none"), key(prompt={"history_tokens": 9})]
    assert len(set(same)) == 1
    llm = {"path": str(models / "llm"), "dtype": "bfloat16"}
    assert len({*same, key(2.0), key(device="cuda"), key(**MIXED), key(llm=llm)}) == 5


@pytest.mark.parametrize(
    ("model", "file", "old", "new"),
    [
        ("hubert-layer", "preprocessor_config.json", '"do_normalize": true', '"do_normalize": false'),
        ("llm", "config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
    ],
)
def test_digest_depends_on_weights_and_settings_alone(
    model: str, file: str, old: str, new: str, models: Path, tmp_path: Path
) -> None:
    def digest(folder: Path) -> str:
        return llm_digest(str(folder), "float32") if model == "llm" else encoder_digest(str(folder))

    for name in ("copy", "weights", "settings"):
        shutil.copytree(models / model, tmp_path / name)
    tensors = load_file(path := tmp_path / "weights" / "model.safetensors")
    tensors[min(tensors)] += 1e-3
    save_file(tensors, path, {"format": "pt"})
    (path := tmp_path / "settings" / file).write_text(path.read_text().replace(old, new))
    assert digest(tmp_path / "copy") == digest(models / model)
    assert len({digest(tmp_path / name) for name in ("copy", "weights", "settings")}) == 3


def test_cache_keys_do_not_change() -> None:
    """Caches of earlier versions are found: a key is a hash of these fields, in this order."""
    common = {"digest": "0", "dtype": "float32", "precision": "float32", "device": "cpu"}
    features = FeatureKey(encoder="any", layers=0, pool=(8, 4), sound="recorded", snr_db=None, **common)
    logits = TeacherKey(llm="any", temperature=1.0, **common)
    assert (features.key, logits.key) == ("248db64e8a27c208", "f8fe5c1d2b154d76")
    assert replace(features, context="clip").key != features.key
    assert replace(features, context="clip").pass_key != features.pass_key

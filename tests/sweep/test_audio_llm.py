"""An audio LLM from the configuration to predictions: inspected, trained, exported; planned beside other models."""

import json
import shutil
from pathlib import Path

import pytest

from data.shards.dataset import Shards
from sweep.config.files import load
from sweep.execution.trial import build
from sweep.preflight.checks import resolve_inputs
from sweep.preflight.dry_run import DryRun, dry_run
from sweep.preflight.feature_cache import cache_requests, cached_folders, precompute
from sweep.preflight.trial_profiles import trial_profiles
from tests.sweep.common import complaint, sweep
from tests.sweep.tiny import config


@pytest.mark.parametrize("kind", ["qwen2-audio", pytest.param("granite-speech", marks=pytest.mark.long)])
def test_audio_llm_is_inspected_trained_and_exported(kind: str, here: Path, models: Path) -> None:
    """`predict` gives the scores of `evaluate`, as test_predict.py shows."""
    options = ["--set=model.encoder.path=null", f"--set=model.llm.path={models / kind}", "--set=train.epochs=1"]
    shown = sweep("inspect", "good.yaml", *options).out
    assert ("<|audio_bos|>[audio: " in shown) == (kind == "qwen2-audio")
    assert f"frozen  {kind}" in shown
    assert sweep("train", "good.yaml", *options, "--out", "trial").code == 0
    assert sweep("export", "trial", "--out", "m").code == 0
    exported = load("m/config.yaml")
    assert (exported.model.encoder.path, exported.model.llm.path) == (None, str(models / kind))
    card = Path("m/README.md").read_text()
    assert "| speech encoder | that of the LLM, frozen |" in card
    assert "base = AutoModelForMultimodalLM.from_pretrained(" in card


def test_search_over_audio_llms_and_other_models(models: Path, corpus: Shards, tmp_path: Path) -> None:
    """Each base has its features: of Whisper, and of the audio LLM's encoder, which any projector reads."""
    other, audio = str(models / "llm"), str(models / "qwen2-audio")
    space = {
        "model.llm.path": [other, audio],
        "model.encoder.path": {"choices": [str(models / "whisper")], "when": {"model.llm.path": [other]}},
        "model.lora.rank": [2, 4],
    }
    made = config(models, corpus, space, model={"encoder": {"path": None}, "llm": {"path": audio}})
    resolved = resolve_inputs(made)
    requests = [request for request, _ in cache_requests(resolved, tmp_path)]
    assert {request.key.encoder for request in requests} == {str(models / "whisper"), audio}
    assert {request.key.pool for request in requests if request.key.encoder == audio} == {None}
    precompute(resolved, tmp_path, lambda line: None)
    profiles, _ = trial_profiles(resolved)
    assert len(profiles) == 2
    for profile in profiles:
        cached = cached_folders(profile.config, tmp_path)
        assert cached.features is not None
        assert dry_run(DryRun(profile.config, cached)).cost is not None
        model, _ = build(profile.config, "local", ("val",), "cpu", cached)
        assert model.encoder is not None
        assert all(parameter.is_meta for parameter in model.encoder.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.encoder.path=null"], "model.encoder.path: null is for an audio LLM"),
        (["model.llm.path=voxtral", "model.encoder.path=null"], "is an audio LLM of the family voxtral, which is not"),
        (["model.llm.path=qwen"], "hears with its own encoder; set model.encoder.path=null"),
        (
            ["model.llm.path=qwen", "model.encoder.path=null", "model.adapter.window=9"],
            "model.adapter.window: 9 has no",
        ),
    ],
)
def test_base_that_does_not_fit_is_one_line(settings: list[str], message: str, here: Path, models: Path) -> None:
    """Before Ray, the cache or any weights: voxtral's folder has none."""
    shutil.copytree(models / "qwen2-audio", here / "qwen")
    (here / "voxtral").mkdir()
    (here / "voxtral/config.json").write_text(json.dumps({"model_type": "voxtral"}))
    options = [f"--set={setting}" for setting in settings]
    for command in (("run", "good.yaml", "--out", "s"), ("inspect", "good.yaml"), ("train", "good.yaml", "--out", "t")):
        assert message in complaint(sweep(*command, *options))

"""Helpers of the tests of parts."""

from pathlib import Path

from data.config import DataConfig, TaskWeights
from data.shards.dataset import Shards
from model.checkpoints.checkpoint import trained_tensors
from model.config import ModelConfig, TrainConfig
from model.evaluation.split_data import TrialData
from model.speech_llm.speech_llm import SpeechLLM
from model.training.trainer import fit
from tests.model.common import ANSWERS

NEW = "adapter+lora+tokens"
LORA = {"rank": 4, "dropout": 0.0, "targets": ["q_proj", "v_proj"]}


def selected(model: SpeechLLM) -> set[str]:
    return set(trained_tensors(model))


def trained(config: ModelConfig, corpus: Shards, folder: Path) -> SpeechLLM:
    model = SpeechLLM(config, {"classify": ANSWERS["classify"]})
    data = TrialData.open(corpus, model, DataConfig(history=2), ("train", "val"))
    train = TrainConfig(epochs=1, batch_size=8, learning_rate=3e-3)
    fit(model, data, train, TaskWeights(), 0, folder, lambda epoch, metrics: None)
    return model

"""The suite notices: each known fault is put back, one at a time, and the test that guards against it must fail.

The table in docs/model.md lists the same faults and tests.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn

from data.loading.examples import Example
from data.shards.dataset import Shards
from model import parts
from model.encoders.base import SpeechEncoder
from model.encoders.masked_layers import MaskedConv1d, MaskedGroupNorm
from model.encoders.wav2vec2 import WaveformEncoder
from model.evaluation import evaluator as evaluate
from model.evaluation import metrics
from model.evaluation import scoring as score
from model.evaluation.metrics import Record
from model.objectives import losses
from model.speech_llm import speech_llm
from model.speech_llm.speech_llm import SpeechLLM, pad_left
from model.training import trainer as train
from tests.model import test_invariance, test_metrics, test_parts, test_resume
from tests.model.common import build

Patch = pytest.MonkeyPatch
Padded = tuple[Tensor, Tensor, Tensor]
DOCS = Path(__file__).resolve().parents[2] / "docs" / "model.md"


@dataclass
class Fixtures:
    """What the guarding tests ask for."""

    models: Path
    corpus: Shards
    examples: list[Example]
    tmp_path: Path


def no_encoder_mask(patch: Patch) -> None:
    from transformers import HubertModel

    forward = HubertModel.forward
    patch.setattr(HubertModel, "forward", lambda self, values, attention_mask, **rest: forward(self, values, **rest))


def unmasked_group_norm(patch: Patch) -> None:
    patch.setattr(MaskedGroupNorm, "forward", nn.GroupNorm.forward)


def unmasked_convolution(patch: Patch) -> None:
    patch.setattr(MaskedConv1d, "forward", nn.Conv1d.forward)


def normalising_after_padding(patch: Patch) -> None:
    original = WaveformEncoder._model_inputs

    def inputs(self: Any, clips: list[np.ndarray], lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        _, valid_BN = original(self, clips, lengths_B)
        width = max(map(len, clips))
        rows = [torch.as_tensor(self._extract(np.pad(clip, (0, width - len(clip))))) for clip in clips]
        return torch.stack(rows) * valid_BN, valid_BN

    patch.setattr(WaveformEncoder, "_model_inputs", inputs)


def ceil_length(patch: Patch) -> None:
    patch.setattr(WaveformEncoder, "_count_frames", lambda self, n_samples: -(-n_samples // 320))


def padding_in_the_sequence(patch: Patch) -> None:
    patch.setattr(speech_llm.Adapter, "num_embeddings", lambda self, n_frames: 10**6)


def first_slots_of_a_left_padded_row(patch: Patch) -> None:
    def faulty(sequences: Sequence[Tensor]) -> Padded:
        _, mask_BT, positions_BT = pad_left(sequences)
        return nn.utils.rnn.pad_sequence(list(sequences), batch_first=True), mask_BT, positions_BT

    patch.setattr(score, "pad_left", faulty)


def middle_padding_with_default_positions(patch: Patch) -> None:
    """Text padded on the left and sound on the right: a hole, which the mask covers and the positions count."""

    def faulty(sequences: Sequence[Tensor]) -> Padded:
        width = max(map(len, sequences))
        rows, masks = [], []
        for sequence in sequences:
            hole, middle = width - len(sequence), len(sequence) // 2
            rows.append(torch.cat([sequence[:middle], sequence.new_zeros(hole, sequence.shape[1]), sequence[middle:]]))
            masks.append(torch.tensor([1] * middle + [0] * hole + [1] * (len(sequence) - middle)))
        mask_BT = torch.stack(masks)
        return torch.stack(rows), mask_BT, torch.arange(width).expand_as(mask_BT)

    patch.setattr(score, "pad_left", faulty)


def no_mask_in_the_llm(patch: Patch) -> None:
    def faulty(sequences: Sequence[Tensor]) -> Padded:
        embeddings_BTE, mask_BT, positions_BT = pad_left(sequences)
        return embeddings_BTE, torch.ones_like(mask_BT), positions_BT

    patch.setattr(score, "pad_left", faulty)


def left_padding_without_a_mask(patch: Patch) -> None:
    def faulty(sequences: list[Tensor], batch_first: bool) -> Tensor:
        return nn.utils.rnn.pad_sequence(sequences, batch_first=batch_first, padding_side="left")

    patch.setattr(losses, "pad_sequence", faulty)


def right_padding_in_generate(patch: Patch) -> None:
    def faulty(sequences: Sequence[Tensor]) -> Padded:
        embeddings_BTE = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
        mask_BT = pad_left(sequences)[1].flip(1)
        return embeddings_BTE, mask_BT, (mask_BT.cumsum(-1) - 1).clamp(min=0)

    patch.setattr(score, "pad_left", faulty)


def packing(patch: Patch, use_cache: bool) -> None:
    """All sequences in one row with positions that start anew: masked apart only where there is no cache."""

    def faulty(llm: Any, sequences: Sequence[Tensor], answers: Sequence[Any], hidden: bool) -> Any:
        positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
        out = llm(
            inputs_embeds=torch.cat(list(sequences))[None],
            position_ids=positions[None],
            use_cache=use_cache,
            output_hidden_states=hidden,
        )
        ends = np.cumsum([len(sequence) for sequence in sequences])
        places, targets, rows = [], [], []
        for row, (end, answer) in enumerate(zip(ends, answers, strict=True)):
            for back, target in enumerate(reversed(answer.targets)):
                if target >= 0:
                    places.append(end - 1 - back)
                    targets.append(target)
                    rows.append(row)
        return losses.StudentOutputs(
            rows_P=torch.tensor(rows),
            targets_P=torch.tensor(targets),
            logits_PV=out.logits[0, places].float(),
            hidden_PE=out.hidden_states[-1][0, places] if hidden else None,
        )

    patch.setattr(losses, "student_outputs", faulty)


def packing_with_a_cache(patch: Patch) -> None:
    packing(patch, use_cache=True)


def mean_of_batch_means(patch: Patch) -> None:
    original = evaluate.predict

    def faulty(model: SpeechLLM, examples: Sequence[Example]) -> list[Record]:
        found = original(model, examples)
        mean = sum(record.loss for record in found) / sum(record.tokens for record in found)
        return [replace(record, loss=mean * (place == 0), tokens=int(place == 0)) for place, record in enumerate(found)]

    patch.setattr(evaluate, "predict", faulty)


def mean_per_micro_batch(patch: Patch) -> None:
    original = train.answer_losses

    def faulty(*args: Any) -> Any:
        found = original(*args)
        found.next_token_B = found.next_token_B / sum(found.count_B)
        return found

    patch.setattr(train, "answer_losses", faulty)


def encoder_left_in_train_mode(patch: Patch) -> None:
    patch.setattr(SpeechLLM, "train", nn.Module.train)
    patch.setattr(SpeechEncoder, "set_dropout", lambda self, share: None)


def batch_norm_in_train_mode(patch: Patch) -> None:
    patch.setattr(SpeechLLM, "train", nn.Module.train)
    patch.setattr(SpeechEncoder, "train", nn.Module.train)


def hallucinated_label_as_a_class(patch: Patch) -> None:
    def faulty(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
        truth, said = [record.label for record in records], [record.prediction for record in records]
        return {f"{name}_f1": float(f1_score(truth, said, average=name)) for name in ("macro", "weighted")}

    patch.setattr(metrics, "_f1", faulty)


def frozen_random_vector(patch: Patch) -> None:
    patch.setattr(parts, "check_loaded", lambda model, loaded: None)
    patch.setattr(speech_llm, "check_loaded", lambda model, loaded: None)


def schedule_not_restored(patch: Patch) -> None:
    patch.setattr(torch.optim.lr_scheduler.LambdaLR, "load_state_dict", lambda self, state: None)


def data_order_not_restored(patch: Patch) -> None:
    original = train.Trainer.resume

    def faulty(self: Any) -> None:
        original(self)
        self.seed += int(self.progress.step > 0)

    patch.setattr(train.Trainer, "resume", faulty)


def generators_not_restored(patch: Patch) -> None:
    patch.setattr(train, "set_random_state", lambda state: None)


def stage(name: str, kind: str = "hubert-layer") -> tuple[Callable[..., None], Callable[[Fixtures], dict[str, Any]]]:
    """One stage of one encoder kind."""
    test = test_invariance.test_each_stage_depends_on_its_own_example_only
    return test, lambda use: {"kind": kind, "stage": name, "models": use.models, "examples": use.examples}


def killed(use: Fixtures) -> dict[str, Any]:
    """A run killed between two checkpoints of its first epoch, beside one that was not."""
    trial, folder = test_resume.RESUMED["lora-dropout"], use.tmp_path / "whole"
    trial.run(use.models, use.corpus, folder)
    own = {"models": use.models, "corpus": use.corpus, "tmp_path": use.tmp_path / "killed"}
    return {"kills": (4,), "whole": (trial, folder), "monkeypatch": pytest.MonkeyPatch(), **own}


def frozen_end_of_audio(use: Fixtures) -> dict[str, Any]:
    return {
        "changed": {"trainable": "adapter+lora"},
        "part": "tokens",
        "name": "end_of_audio",
        "models": use.models,
    }


FAULTS: dict[str, tuple[Callable[[Patch], None], Callable[..., None], Callable[[Fixtures], dict[str, Any]]]] = {
    "no encoder mask": (no_encoder_mask, *stage("clips")),
    "unmasked group norm": (unmasked_group_norm, *stage("clips", "hubert-group")),
    "unmasked convolution in a conformer": (unmasked_convolution, *stage("clips", "conformer-relative")),
    "normalising after padding": (normalising_after_padding, *stage("clips")),
    "ceil length": (ceil_length, *stage("clips")),
    "padded embeddings in the sequence": (padding_in_the_sequence, *stage("prompts")),
    "first instead of last slots of a left-padded row": (first_slots_of_a_left_padded_row, *stage("scores")),
    "middle padding with default positions": (middle_padding_with_default_positions, *stage("scores")),
    "no mask in the LLM": (no_mask_in_the_llm, *stage("scores")),
    "left padding without a mask": (left_padding_without_a_mask, *stage("losses")),
    "packing with a cache": (packing_with_a_cache, *stage("losses")),
    "right padding in generate": (
        right_padding_in_generate,
        test_invariance.test_generated_texts_depend_on_their_own_example_only,
        lambda use: {"models": use.models, "examples": use.examples},
    ),
    "mean of batch means": (
        mean_of_batch_means,
        test_invariance.test_metrics_do_not_depend_on_the_batch_size,
        lambda use: {"batch_size": 5, "models": use.models, "corpus": use.corpus},
    ),
    "mean per micro-batch": (
        mean_per_micro_batch,
        test_invariance.test_a_step_does_not_depend_on_how_it_is_cut,
        lambda use: {"kind": "hubert-layer", "models": use.models, "corpus": use.corpus},
    ),
    "encoder left in train mode": (
        encoder_left_in_train_mode,
        test_invariance.test_a_frozen_encoder_is_the_same_in_training,
        lambda use: {"models": use.models, "examples": use.examples},
    ),
    "batch norm in train mode": (
        batch_norm_in_train_mode,
        test_invariance.test_a_frozen_encoder_is_the_same_in_training,
        lambda use: {"models": use.models, "examples": use.examples},
    ),
    "hallucinated label counted as a class": (
        hallucinated_label_as_a_class,
        test_metrics.test_prediction_outside_the_labels_is_wrong_and_no_class,
        lambda use: {"sets": False},
    ),
    "frozen random end-of-audio vector": (
        frozen_random_vector,
        test_parts.test_what_would_stay_random_is_refused,
        frozen_end_of_audio,
    ),
    "schedule not restored": (schedule_not_restored, test_resume.test_a_killed_run_resumes_bit_for_bit, killed),
    "data order not restored": (data_order_not_restored, test_resume.test_a_killed_run_resumes_bit_for_bit, killed),
    "generators not restored": (generators_not_restored, test_resume.test_a_killed_run_resumes_bit_for_bit, killed),
}


@pytest.fixture
def fixtures(models: Path, corpus: Shards, examples: list[Example], tmp_path: Path) -> Fixtures:
    return Fixtures(models, corpus, examples, tmp_path)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_is_put_back_is_noticed(fault: str, fixtures: Fixtures, monkeypatch: Patch) -> None:
    put_back, guard, arguments = FAULTS[fault]
    given = arguments(fixtures)
    put_back(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)) as noticed:
        guard(**given)
    # By what a test compares, and not by an invariant of the code that the fault happens to trip over.
    assert "tests" in noticed.traceback[-1].path.parts or noticed.type is pytest.fail.Exception


def test_packing_without_a_cache_is_no_fault(models: Path, examples: list[Example], monkeypatch: Patch) -> None:
    """So it is the cache that `packing with a cache` is caught for."""
    packing(monkeypatch, use_cache=False)
    test_invariance.check_stage("losses", build(models), examples)


def test_the_documents_list_the_same_faults() -> None:
    listed = dict(re.findall(r"^\| ([^|]+?) \| `([^`]+)` \|$", DOCS.read_text(), re.MULTILINE))
    named = {
        fault: f"{guard.__module__.rsplit('.', 1)[-1]}::{guard.__name__}" for fault, (_, guard, _) in FAULTS.items()
    }
    assert listed == named

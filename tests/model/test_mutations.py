"""The suite notices faults: each known fault is put back, one at a time, and the test that guards against it must fail.

The table in docs/model.md lists the same faults and tests.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import HubertModel

from data.loading.examples import Example
from data.shards.dataset import Shards
from model import parts
from model.encoders import audio_llms, whisper
from model.encoders.audio_llms import GraniteSpeechEncoder
from model.encoders.base import OUTPUT, SpeechEncoder
from model.encoders.frozen_features import FeatureKey
from model.encoders.masked_layers import MaskedConv1d, MaskedGroupNorm
from model.encoders.wav2vec2 import WaveformEncoder
from model.encoders.whisper import WhisperEncoder
from model.evaluation import evaluator, metrics, scoring
from model.evaluation.metrics import Record
from model.objectives import losses
from model.speech_llm import adapter, packing, speech_llm
from model.speech_llm.adapter import Adapter, cut_into_windows, merge_frames
from model.speech_llm.label_trie import LabelTrie
from model.speech_llm.packing import Packed, Row
from model.speech_llm.queries import Attention
from model.speech_llm.speech_llm import SpeechLLM, pad_left
from model.training import trainer
from tests.model import (
    test_audio_llms,
    test_encoder_layers,
    test_encoder_lora,
    test_encoders,
    test_feature_cache,
    test_invariance,
    test_metrics,
    test_parts,
    test_resume,
    test_votes,
)
from tests.model.common import build
from tests.model.trials import Trial

Patch, Factory = pytest.MonkeyPatch, pytest.TempPathFactory
Padded = tuple[Tensor, Tensor, Tensor]
DOCS = Path(__file__).resolve().parents[2] / "docs" / "model.md"


# Faults of encoders -------------------------------------------------------------------------------------------------


def no_encoder_mask(patch: Patch) -> None:
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


def encoder_left_in_train_mode(patch: Patch) -> None:
    patch.setattr(SpeechLLM, "train", nn.Module.train)
    patch.setattr(SpeechEncoder, "set_dropout", lambda self, probability: None)


def batch_norm_in_train_mode(patch: Patch) -> None:
    patch.setattr(SpeechLLM, "train", nn.Module.train)
    patch.setattr(SpeechEncoder, "train", nn.Module.train)


def no_mask_behind_a_clip(patch: Patch) -> None:
    patch.setattr(whisper, "create_bidirectional_mask", lambda *arguments: None)


def clips_in_one_batch(patch: Patch) -> None:
    """As transformers computes Granite Speech: no layer has a mask for the padding."""

    def encode(self: Any, clips: list[np.ndarray], time_masks: Any) -> tuple[Tensor, list[int]]:
        features = [torch.as_tensor(self._extract(clip)) for clip in clips]
        hidden_BFD = self.model(pad_sequence(features, batch_first=True)).last_hidden_state
        lengths = list(map(len, features))
        return pad_sequence(
            [row[:size] for row, size in zip(hidden_BFD, lengths, strict=True)], batch_first=True
        ), lengths

    patch.setattr(GraniteSpeechEncoder, "_encode", encode)


def no_ctc_above_frozen_layers(patch: Patch) -> None:
    original = GraniteSpeechEncoder.forward_from_layer

    def forward(self: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self.model, "num_layers", 0)
            return original(self, *arguments)

    patch.setattr(GraniteSpeechEncoder, "forward_from_layer", forward)


def dropout_of_the_projector(patch: Patch) -> None:
    patch.setattr(audio_llms, "set_dropout", lambda model, probability: None)
    patch.setattr(audio_llms, "_load_projector", audio_llms._load_projector.__wrapped__)  # type: ignore[attr-defined]


def published_adapter_left_out(patch: Patch) -> None:
    patch.setattr(audio_llms, "_add_lora", lambda *arguments: None)


# Faults of padding --------------------------------------------------------------------------------------------------


def padding_in_the_sequence(patch: Patch) -> None:
    patch.setattr(speech_llm.Adapter, "num_embeddings", lambda self, n_frames: 10**6)


def in_scoring(pad: Callable[[Sequence[Tensor]], Padded]) -> Callable[[Patch], None]:
    """Return a fault that pads sequences for label scores and replies in another way."""
    return lambda patch: patch.setattr(scoring, "pad_left", pad)


@in_scoring
def first_slots_of_a_left_padded_row(sequences: Sequence[Tensor]) -> Padded:
    _, mask_BT, positions_BT = pad_left(sequences)
    return pad_sequence(list(sequences), batch_first=True), mask_BT, positions_BT


@in_scoring
def middle_padding_with_default_positions(sequences: Sequence[Tensor]) -> Padded:
    """Text is padded on the left and audio on the right: the mask covers the hole, and the positions count it."""
    width = max(map(len, sequences))
    rows, masks = [], []
    for sequence in sequences:
        hole, middle = width - len(sequence), len(sequence) // 2
        rows.append(torch.cat([sequence[:middle], sequence.new_zeros(hole, sequence.shape[1]), sequence[middle:]]))
        masks.append(torch.tensor([1] * middle + [0] * hole + [1] * (len(sequence) - middle)))
    mask_BT = torch.stack(masks)
    return torch.stack(rows), mask_BT, torch.arange(width).expand_as(mask_BT)


@in_scoring
def no_mask_in_the_llm(sequences: Sequence[Tensor]) -> Padded:
    embeddings_BTE, mask_BT, positions_BT = pad_left(sequences)
    return embeddings_BTE, torch.ones_like(mask_BT), positions_BT


@in_scoring
def right_padding_in_generate(sequences: Sequence[Tensor]) -> Padded:
    mask_BT = pad_left(sequences)[1].flip(1)
    return pad_sequence(list(sequences), batch_first=True), mask_BT, (mask_BT.cumsum(-1) - 1).clamp(min=0)


def left_padding_without_a_mask(patch: Patch) -> None:
    def pad(sequences: list[Tensor], batch_first: bool) -> Tensor:
        return pad_sequence(sequences, batch_first=batch_first, padding_side="left")

    patch.setattr(losses, "pad_sequence", pad)


def attention_across_examples(patch: Patch) -> None:
    patch.setattr(packing, "Row", lambda lengths, nodes, bounds: Row([sum(lengths)], nodes, bounds))


def positions_that_do_not_restart(patch: Patch) -> None:
    def packed(embeddings: Tensor, positions: Tensor, row: Row, starts: list[int]) -> Packed:
        return Packed(embeddings, torch.arange(positions.shape[1])[None], row, starts)

    patch.setattr(packing, "Packed", packed)


def nodes_of_a_trie_in_a_row(patch: Patch) -> None:
    """The labels of a packed example see each other."""
    patch.setattr(packing, "Row", lambda lengths, nodes, bounds: Row(lengths, None, bounds))


def cache_that_disables_packing(patch: Patch, use_cache: bool = True) -> None:
    """As transformers packs: it masks the sequences of a row apart by their positions, unless there is a cache."""

    def student_outputs(llm: Any, sequences: Sequence[Tensor], answers: Sequence[Any], hidden: bool) -> Any:
        positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
        inputs = {"inputs_embeds": torch.cat(list(sequences))[None], "position_ids": positions[None]}
        out = llm(**inputs, use_cache=use_cache, output_hidden_states=hidden)
        predicted = [
            (row, end - 1 - back, target)
            for row, (end, answer) in enumerate(zip(np.cumsum(list(map(len, sequences))), answers, strict=True))
            for back, target in enumerate(reversed(answer.targets))
            if target >= 0
        ]
        rows_P, columns_P, targets_P = torch.tensor(predicted).unbind(-1)
        hidden_PE = out.hidden_states[-1][0, columns_P] if hidden else None
        return losses.StudentOutputs(rows_P, targets_P, out.logits[0, columns_P].float(), hidden_PE)

    patch.setattr(losses, "student_outputs", student_outputs)


# Faults of heard layers, LoRA of the encoder, queries and merging -----------------------------------------------------


def wrong_encoder_layer(patch: Patch) -> None:
    """Hidden states inside the encoder are taken one layer too low."""
    original = SpeechEncoder._kept

    @contextmanager
    def kept(self: Any, indices: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        found: dict[int, Tensor] = {}
        with original(self, [max(0, index - 1) for index in indices]) as inner:
            yield found
        found |= {index: inner[max(0, index - 1)] for index in indices}

    patch.setattr(SpeechEncoder, "_kept", kept)


def final_norm_after_any_layer(patch: Patch) -> None:
    patch.setattr(WhisperEncoder, "_drop_final_norm", lambda self: None)


def layers_normalised_over_the_batch(patch: Patch) -> None:
    original = Adapter._sum_layers
    patch.setattr(Adapter, "_sum_layers", lambda self, frames: original(self, frames - frames.mean((0, 1))))


def clip_frames_read_as_a_layer_input(patch: Patch) -> None:
    """Whisper's layers read the window, and the adapter the frames of the clip alone."""
    original = SpeechEncoder.layer_inputs

    def layer_inputs(self: Any, clip: np.ndarray, indices: Sequence[int]) -> dict[int, Tensor]:
        inside = torch.arange(self.num_computed_frames(len(clip))) < self.num_frames(len(clip))
        return {index: state * inside[:, None] for index, state in original(self, clip, indices).items()}

    patch.setattr(SpeechEncoder, "layer_inputs", layer_inputs)


def key_without_the_layer(patch: Patch) -> None:
    original = FeatureKey.key.fget
    patch.setattr(FeatureKey, "key", property(lambda key: original(replace(key, state=OUTPUT))))


def lora_below_the_cached_layers(patch: Patch) -> None:
    original = SpeechEncoder.frozen_layers.fget
    patch.setattr(SpeechEncoder, "frozen_layers", property(lambda encoder: original(encoder) + 1))


def queries_that_attend_to_padding(patch: Patch) -> None:
    original = Attention.forward
    patch.setattr(Attention, "forward", lambda self, queries, frames, valid: original(self, queries, frames, None))


def windows_across_clips(patch: Patch) -> None:
    def cut(clips: Sequence[Tensor], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        return cut_into_windows([torch.cat(list(clips))], [sum(counts)])

    patch.setattr(adapter, "cut_into_windows", cut)


def merging_across_clips(patch: Patch) -> None:
    def embed(self: Any, clips: Sequence[Tensor]) -> list[Tensor]:
        counts = [self.num_embeddings(len(clip)) for clip in clips]
        return list(self._project(merge_frames(torch.cat(list(clips)), sum(counts))).split(counts))

    patch.setattr(Adapter, "_embed", embed)


# Faults of losses, metrics, parts and resuming ------------------------------------------------------------------------


def mean_of_batch_means(patch: Patch) -> None:
    original = evaluator.predict

    def predict(model: SpeechLLM, examples: Sequence[Example]) -> Callable[[], list[Record]]:
        records = original(model, examples)()
        mean = sum(record.loss for record in records) / sum(record.tokens for record in records)
        return lambda: [
            replace(record, loss=mean * (row == 0), tokens=int(row == 0)) for row, record in enumerate(records)
        ]

    patch.setattr(evaluator, "predict", predict)


def mean_per_micro_batch(patch: Patch) -> None:
    original = trainer.answer_losses

    def answer_losses(*args: Any) -> Any:
        result = original(*args)
        result.next_token_B = result.next_token_B / sum(result.count_B)
        return result

    patch.setattr(trainer, "answer_losses", answer_losses)


def votes_normalised_per_batch(patch: Patch) -> None:
    original = losses.token_shares

    def token_shares(*args: Any) -> list[list[float]]:
        shares = original(*args)
        total = sum(share for share, _ in shares)
        return [[len(args[0]) * share / total, weighted] for share, weighted in shares]

    patch.setattr(losses, "token_shares", token_shares)


def labels_of_a_vote_that_see_each_other(patch: Patch) -> None:
    """As in a causal mask; in a batch, too, each example sees only its own labels."""
    patch.setattr(LabelTrie, "ancestors", property(lambda trie: np.tri(len(trie.nodes), dtype=bool).tolist()))


def hallucinated_label_as_a_class(patch: Patch) -> None:
    def f1(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
        truth, predicted = [record.label for record in records], [record.prediction for record in records]
        return {f"{name}_f1": float(f1_score(truth, predicted, average=name)) for name in ("macro", "weighted")}

    patch.setattr(metrics, "_f1", f1)


def frozen_random_vector(patch: Patch) -> None:
    for module in (parts, speech_llm):
        patch.setattr(module, "check_loaded", lambda *_: None)


def schedule_not_restored(patch: Patch) -> None:
    patch.setattr(torch.optim.lr_scheduler.LambdaLR, "load_state_dict", lambda self, state: None)


def data_order_not_restored(patch: Patch) -> None:
    original = trainer.Trainer.resume

    def resume(self: Any) -> None:
        original(self)
        self.seed += int(self.progress.step > 0)

    patch.setattr(trainer.Trainer, "resume", resume)


def generators_not_restored(patch: Patch) -> None:
    patch.setattr(trainer, "set_random_state", lambda state: None)


# Faults and the tests that guard against them -------------------------------------------------------------------------

ADAPTER = test_audio_llms.test_published_adapter_belongs_to_the_model
TWO_STEPS = test_encoders.test_two_steps_yield_the_frames_of_one
STAGES = test_invariance.test_stages_do_not_depend_on_the_batch
TRAIN_MODE = test_invariance.test_frozen_encoder_is_the_same_in_training
RESUME = test_resume.test_a_killed_run_resumes_bit_for_bit
OUTSIDE = test_metrics.test_prediction_outside_the_labels_is_wrong_and_no_class
RANDOM = test_parts.test_parts_that_would_stay_random_are_refused
GENERATE = test_invariance.test_generated_texts_do_not_depend_on_the_batch
METRICS = test_invariance.test_metrics_do_not_depend_on_the_batch_size
MICRO_BATCHES = test_invariance.test_step_does_not_depend_on_the_micro_batches
PACKED = test_invariance.test_packed_stages_equal_unpacked_ones
LLAMA, GPT2 = ({"family": family, "packed": "packed"} for family in ("llama", "gpt2"))
VARIANTS = test_invariance.test_variants_do_not_depend_on_the_batch
STATES = test_encoder_layers.test_layers_are_the_hidden_states_of_transformers
HEARD_STEPS = test_encoder_layers.test_two_steps_yield_the_heard_layers_of_one
ADAPTED = test_encoder_lora.test_upper_layers_alone_are_adapted_and_counted
KEYS = test_feature_cache.test_feature_key_covers_exactly_what_features_depend_on
VOTES = test_votes.test_vote_loss_equals_single_labels_in_float64
HUBERT = {"kind": "hubert-layer"}
TOKENS = {"changed": {"trainable": "adapter+lora"}, "part": "tokens", "name": "end_of_audio"}

# Each with the guarding test and the arguments of it that are not fixtures.
FAULTS: dict[str, tuple[Callable[[Patch], None], Callable[..., None], dict[str, Any]]] = {
    "no encoder mask": (no_encoder_mask, STAGES, HUBERT | {"stages": ["clips"]}),
    "unmasked group norm": (unmasked_group_norm, STAGES, {"kind": "hubert-group", "stages": ["clips"]}),
    "unmasked convolution in a conformer": (
        unmasked_convolution,
        STAGES,
        {"kind": "conformer-relative", "stages": ["clips"]},
    ),
    "normalising after padding": (normalising_after_padding, STAGES, HUBERT | {"stages": ["clips"]}),
    "ceil length": (ceil_length, STAGES, HUBERT | {"stages": ["clips"]}),
    "no mask behind a clip of Qwen2-Audio": (
        no_mask_behind_a_clip,
        STAGES,
        {"kind": "qwen2-audio", "stages": ["clips"]},
    ),
    "clips of Granite Speech in one batch": (
        clips_in_one_batch,
        STAGES,
        {"kind": "granite-speech", "stages": ["clips"]},
    ),
    "no CTC above frozen layers": (no_ctc_above_frozen_layers, TWO_STEPS, {"kind": "granite-speech"}),
    "dropout of an audio LLM's projector": (dropout_of_the_projector, MICRO_BATCHES, {"kind": "granite-speech"}),
    "published adapter left out": (published_adapter_left_out, ADAPTER, {}),
    "padded embeddings in the sequence": (padding_in_the_sequence, STAGES, HUBERT | {"stages": ["prompts"]}),
    "first instead of last slots of a left-padded row": (
        first_slots_of_a_left_padded_row,
        STAGES,
        HUBERT | {"stages": ["scores"]},
    ),
    "middle padding with default positions": (
        middle_padding_with_default_positions,
        STAGES,
        HUBERT | {"stages": ["scores"]},
    ),
    "no mask in the LLM": (no_mask_in_the_llm, STAGES, HUBERT | {"stages": ["scores"]}),
    "left padding without a mask": (left_padding_without_a_mask, STAGES, HUBERT | {"stages": ["losses"]}),
    "attention across examples": (attention_across_examples, PACKED, LLAMA | {"stages": ["losses"]}),
    "positions that do not restart": (positions_that_do_not_restart, PACKED, GPT2 | {"stages": ["losses"]}),
    "labels of a packed example that see each other": (
        nodes_of_a_trie_in_a_row,
        PACKED,
        LLAMA | {"stages": ["losses of votes"]},
    ),
    "a cache that disables packing": (cache_that_disables_packing, PACKED, LLAMA | {"stages": ["losses"]}),
    "right padding in generate": (right_padding_in_generate, GENERATE, {}),
    "mean of batch means": (mean_of_batch_means, METRICS, {"batch_size": 5}),
    "mean per micro-batch": (mean_per_micro_batch, MICRO_BATCHES, HUBERT),
    "encoder left in train mode": (encoder_left_in_train_mode, TRAIN_MODE, {}),
    "batch norm in train mode": (batch_norm_in_train_mode, TRAIN_MODE, {}),
    "wrong encoder layer": (wrong_encoder_layer, STATES, HUBERT),
    "final norm after any layer": (final_norm_after_any_layer, STATES, {"kind": "whisper"}),
    "layers normalised over the batch": (
        layers_normalised_over_the_batch,
        VARIANTS,
        {"variant": "encoder: weighted layers"},
    ),
    "frames of the clip read as a layer's input": (clip_frames_read_as_a_layer_input, HEARD_STEPS, {"kind": "whisper"}),
    "cache key without the layer": (key_without_the_layer, KEYS, {}),
    "LoRA of the encoder below the cached layers": (lora_below_the_cached_layers, ADAPTED, {}),
    "queries that attend to padding": (queries_that_attend_to_padding, VARIANTS, {"variant": "queries over a clip"}),
    "windows of queries across clips": (windows_across_clips, VARIANTS, {"variant": "queries in windows"}),
    "merging across clips": (merging_across_clips, VARIANTS, {"variant": "merged frames, frozen"}),
    "votes normalised per batch": (votes_normalised_per_batch, STAGES, HUBERT | {"stages": ["losses of votes"]}),
    "labels of a vote that see each other": (labels_of_a_vote_that_see_each_other, VOTES, {"changed": {}}),
    "hallucinated label counted as a class": (hallucinated_label_as_a_class, OUTSIDE, {"sets": False}),
    "frozen random end-of-audio vector": (frozen_random_vector, RANDOM, TOKENS),
    "schedule not restored": (schedule_not_restored, RESUME, {"kills": (4,)}),
    "data order not restored": (data_order_not_restored, RESUME, {"kills": (4,)}),
    "generators not restored": (generators_not_restored, RESUME, {"kills": (4,)}),
}


@pytest.fixture(scope="module")
def whole(models: Path, corpus: Shards, tmp_path_factory: Factory) -> tuple[Trial, Path]:
    """A run that is not killed, to compare one that is killed between two checkpoints with."""
    trial, folder = test_resume.RESUMED["lora-dropout"], tmp_path_factory.mktemp("whole")
    trial.run(models, corpus, folder)
    return trial, folder


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_noticed(fault: str, monkeypatch: Patch, request: pytest.FixtureRequest) -> None:
    put_back, guard, given = FAULTS[fault]
    names = [name for name in inspect.signature(guard).parameters if name not in (*given, "stages", "monkeypatch")]
    given = given | {name: request.getfixturevalue(name) for name in names}
    put_back(monkeypatch)
    if "monkeypatch" in inspect.signature(guard).parameters:
        given["monkeypatch"] = pytest.MonkeyPatch()  # the guard undoes its own patches, and keeps the fault
    with pytest.raises((AssertionError, pytest.fail.Exception)) as noticed:
        guard(**given)
    # The comparison of a test must fail, not an invariant of the code that the fault happens to violate.
    assert "tests" in noticed.traceback[-1].path.parts or noticed.type is pytest.fail.Exception


def test_packing_without_a_cache_is_no_fault(models: Path, examples: list[Example], monkeypatch: Patch) -> None:
    """The cache is therefore what `a cache that disables packing` is caught for."""
    cache_that_disables_packing(monkeypatch, use_cache=False)
    test_invariance.check_stages(["losses"], build(models), examples)


def test_documents_list_the_same_faults() -> None:
    listed = dict(re.findall(r"^\| ([^|]+?) \| `([^`]+)` \|$", DOCS.read_text(), re.MULTILINE))
    assert listed == {
        fault: f"{guard.__module__.rsplit('.', 1)[-1]}::{guard.__name__}" for fault, (_, guard, _) in FAULTS.items()
    }

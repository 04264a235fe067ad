"""The speech LLM: clips and dialogue in one sequence of embeddings, read by a causal language model with LoRA.

    clip ─ encoder ─ adapter ─┐
    text ─ embedding table ───┴─ prompt embeddings ─ LLM with LoRA ─ label scores, losses, replies

What follows the prompt embeddings is in `model/objectives/losses.py` (training) and `model/evaluation/scoring.py`.

Legend: B examples, F frames, D width of the encoder, T positions of the sequence, E width of the LLM.
"""

import contextlib
import math
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from data.corpus.audio import waveform
from data.corpus.schema import SAMPLE_RATE
from data.errors import ConfigError, MisfitError, UnavailableError
from data.loading.batching import Cost, groups, micro_batches, packs
from data.loading.examples import Example
from data.loading.tasks import AnswerSet
from model.checkpoints import checkpoint
from model.checkpoints.audio_llms import check_audio_llm
from model.checkpoints.base_files import base_models
from model.checkpoints.fingerprint import BaseIdentity, Bases, digest, identify
from model.checkpoints.warm_start import (
    check_meaning,
    check_parent_bases,
    load_lora,
    load_parent,
    load_parent_tensors,
    match_names,
)
from model.config import NEW_PARTS, ModelConfig
from model.encoders.audio_llms import Projector, load_projector
from model.encoders.base import OUTPUT, SpeechEncoder
from model.encoders.frozen_features import FeatureSpec, clip_features, feature_specs
from model.encoders.loading import load_encoder
from model.encoders.lora import add_lora
from model.encoders.spec_augment import draw_time_mask
from model.parts import check_loaded, part_of, select_trainable
from model.runtime.device import on_device, pad_tolerance
from model.speech_llm.adapter import Adapter, load_adapter
from model.speech_llm.label_trie import LabelTrie, label_trie, shared_prefixes
from model.speech_llm.language_model import (
    copy_parameters,
    embedding_scale,
    llm_layers,
    load_llm_with_lora,
    max_positions,
    shared_view,
)
from model.speech_llm.packing import is_packing
from model.speech_llm.prompt import CLIP, CLS, END, Answer, PromptBuilder, answer_text
from model.speech_llm.quantization import check_frozen
from model.speech_llm.sharding import Sharding
from model.speech_llm.tokenizer import load_tokenizer


class SpeechLLM(nn.Module):
    """A model for one or several tasks on dialogues whose audio turn is read as text, as audio, or both.

    A process loads the encoder and the LLM once. Each instance has its own module tree over their frozen weights, so
    one instance after another can be trained without a trace of the one before.

    Args:
        config: of the model.
        answers: the possible answers of each task.
        device: "cpu", "cuda", or "meta" for everything but the weights, to check a configuration and count parameters.
        encodes: whether examples carry clips. If not, they carry cached features, and the weights of a frozen encoder
            are not loaded.
        bases: what identifies the base models, by setting, as far as it is known; a model with weights identifies them
            by itself.
        allow_other_base: accept tensors that were trained on other base models.

    Raises:
        ConfigError: a part cannot be loaded, does not fit the other parts, or is frozen without having been loaded.
        OtherBaseError: `model.init_from` was trained on another base model.
    """

    sharding: Sharding | None = None

    def __init__(
        self,
        config: ModelConfig,
        answers: Mapping[str, AnswerSet],
        device: str = "cpu",
        *,
        encodes: bool = True,
        bases: Bases | None = None,
        allow_other_base: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.tasks = dict(answers)
        self.prompt_builder = PromptBuilder(load_tokenizer(config.llm.path), config)
        self.answers: dict[str, dict[str, Answer]] = {}
        self.tries: dict[str, LabelTrie] = {}
        for task, answer_set in answers.items():
            self.answers[task] = self.prompt_builder.label_answers(task, answer_set.labels)
            self.tries[task] = label_trie(list(self.answers[task].values()))
            alike = shared_prefixes(self.answers[task])
            if config.cls == "after" and alike:
                raise ConfigError(
                    f"model.cls: after cannot distinguish {alike[0][0]!r} from {alike[0][1]!r}, which begin with the "
                    f"same tokens (tasks.{task}), because nothing is predicted where the first one ends; use before or "
                    "none"
                )

        self.base_device = device  # as the base models were loaded: torch may name it otherwise ("cuda:0")
        self.llm = load_llm_with_lora(config, device)
        self.max_positions = max_positions(self.llm)
        check_audio_llm(config)
        own_encoder = config.encoder.path is None
        embedding = self.llm.get_input_embeddings().weight
        n_tokens = self.prompt_builder.tokenizer.n_embedded(config.llm.path)
        if n_tokens > len(embedding):
            raise ConfigError(
                f"model.llm.path: the tokenizer of {config.llm.path} has {n_tokens} tokens, but the LLM embeds "
                f"{len(embedding)}; use the tokenizer that belongs to it"
            )
        self.encoder: SpeechEncoder | None = None
        self.adapter: Adapter | Projector | None = None
        fixed: set[str] = set()
        if config.uses_audio:
            has_weights = encodes or config.encoder.lora.rank > 0  # adapted layers compute
            self.encoder, fixed = self._view_encoder(device if has_weights else "meta")
            if own_encoder:
                self.adapter = load_projector(config.llm.path, device)
            else:
                weighted = len(self.encoder.states) if config.encoder.layers == "weighted" else 0
                width = self.encoder.state_width if weighted else self.encoder.width
                rate = self.encoder.frame_rate
                self.adapter = Adapter(width, embedding.shape[1], config.adapter, weighted, rate).to(device)
        wants_end = config.uses_audio and config.end_of_audio == "learned"
        self.end_of_audio = self._learned_vector() if wants_end else None
        self.cls = self._learned_vector() if config.cls != "none" else None
        self.sources = {"encoder": config.encoder_path, "llm": config.llm.path}
        self.sources |= {"adapter": config.llm.path} if own_encoder else {}
        self.parents: list[checkpoint.ParentLink] = []
        self.files: dict[str, str] = {}  # digests of other files that were loaded, by configuration key
        trained = select_trainable(self, config.patterns, fixed)
        if self.encoder is not None:
            if not has_weights and "encoder" in map(part_of, trained):  # its upper layers compute
                self.encoder, _ = self._view_encoder(device)
            self.encoder.set_dropout(config.encoder.dropout)
            self.encoder.set_context(config.encoder.context)
        self.bases: dict[str, BaseIdentity] = {**(bases or {}), **({} if device == "meta" else self._identify(encodes))}
        self.allow_other_base = allow_other_base
        self._load_and_freeze(trained)
        self.augment = (0, 0)  # seed and epoch, from which the SpecAugment masks of all clips follow

    def _view_encoder(self, device: str) -> tuple[SpeechEncoder, set[str]]:
        """Return a view of the encoder with the layers that are heard, and the parameters of it that never train."""
        config = self.config.encoder
        loaded = load_encoder(self.config.encoder_path, device, config.dtype)
        encoder = shared_view(loaded)
        encoder.set_layers(config.layers)
        if config.lora.rank:
            add_lora(encoder, config.lora)
        return encoder, {f"encoder.{name}" for name, tensor in loaded.named_parameters() if not tensor.requires_grad}

    def _learned_vector(self) -> nn.Parameter:
        """Return a vector [E] that starts at the scale of what the LLM's embedding layer puts out."""
        layer = self.llm.get_input_embeddings()
        start_E = torch.randn(layer.weight.shape[1])
        scale = 1.0 if layer.weight.is_meta else embedding_scale(layer)
        return nn.Parameter((start_E * scale).to(layer.weight.device))

    def _identify(self, encodes: bool) -> dict[str, BaseIdentity]:
        """Return what identifies the base models, after they were loaded: loading an id may update its files."""
        found: dict[str, BaseIdentity] = {}
        for setting, path, part in base_models(self.config):
            # Where cached features replace the encoder, its weights need not be on this machine.
            with contextlib.suppress(*(() if encodes or part != "encoder" else (UnavailableError,))):
                if (identity := identify(setting, path, part)) is not None:
                    found[setting] = identity
        return found

    def _load_and_freeze(self, trained: set[str]) -> None:
        """Load what starts from files, and let the parameters named in `trained` require gradients."""
        config = self.config
        loaded: set[str] = set()
        if isinstance(self.adapter, Adapter) and config.adapter.init_from is not None:
            path = config.adapter.init_from
            names, self.sources["adapter"] = load_adapter(self.adapter, path, config.adapter.init_partial)
            loaded |= {f"adapter.{name}" for name in names}
            if not any(name.startswith("adapter.") for name in trained) and not self.adapter.linear.weight.is_meta:
                self.files["model.adapter.init_from"] = digest(self.adapter.state_dict())
        if config.lora.enabled and config.lora.init_from is not None:
            lora = load_lora(self, config.lora, config.lora.init_from)
            self.sources["lora"] = config.lora.init_from
            loaded |= lora.keys()
            if not lora.keys() & trained and not any(tensor.is_meta for tensor in lora.values()):
                self.files["model.lora.init_from"] = digest(lora)
        tensors: dict[str, Tensor] = {}
        if config.init_from is not None:
            former = load_parent(config.init_from)
            tensors, self.parents = match_names(self, former.tensors), former.lineage
            if config.lora.init_from is not None and any(part_of(name) == "lora" for name in tensors):
                raise ConfigError(
                    f"model.lora.init_from: {config.lora.init_from}, and model.init_from ({config.init_from}) would "
                    "start LoRA, too; remove one of them"
                )
        check_frozen(config.llm.load_in, trained | tensors.keys())
        copy_parameters(self, {name for name in trained | tensors.keys() if part_of(name) in ("encoder", "llm")})
        if config.init_from is not None:
            names, report = load_parent_tensors(self, tensors, config.init_from, config.init_partial)
            loaded |= names
            check_meaning(former, self.meaning(), {part_of(name) for name in names})
            if not self.allow_other_base:
                check_parent_bases(former, self.bases, {part_of(name) for name in names})
            report += f"; trained on corpus {former.fingerprint}"
            self.sources |= {part_of(name): report for name in names}
        self.trained_parts = {part_of(name) for name in trained}
        if "encoder" in self.trained_parts and config.encoder.dtype != "float32":
            raise ConfigError(
                f"model.encoder.dtype: {config.encoder.dtype} is for an encoder that stays frozen, and "
                f"model.trainable ({config.trainable}) trains it; set float32 and model.precision=bfloat16"
            )
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in trained)
            if name in trained and part_of(name) == "llm" and parameter.dtype != torch.float32:
                raise ConfigError(
                    f"model.llm.dtype: {config.llm.dtype} is for weights that stay frozen, and model.trainable "
                    f"names {name}; set float32 and model.precision=bfloat16"
                )
        # The lower layers of an encoder whose upper layers train compute clip by clip, as a frozen encoder does, unless
        # something random happens in them. 0 also if the whole encoder is frozen.
        self.frozen_layers = 0
        draws = config.encoder.dropout or config.encoder.spec_augment
        if self.encoder is not None and not self.encoder_is_frozen and not draws:
            self.frozen_layers = self.encoder.frozen_layers
        self.loaded = loaded
        pretrained = isinstance(self.adapter, Projector)
        check_loaded(self, loaded, NEW_PARTS[1:] if pretrained else NEW_PARTS)

    def meaning(self) -> dict[str, str]:
        """Return by part the settings under which its tensors were trained and without which they are useless."""
        adapter, lora, layers = self.config.adapter, self.config.lora, self.config.encoder.layers
        every = self.encoder is None or self.encoder.states == (OUTPUT,)
        heard = "" if every else f", encoder layers {layers}"
        own, adapted = self.config.encoder.path is None, self.config.encoder.lora
        ratio = adapted.alpha_ratio or adapted.alpha / max(1, adapted.rank)
        return ({"encoder_lora": f"scale {ratio:.6g}"} if adapted.rank else {}) | {
            "adapter": "the projector of an audio LLM" if own else adapter.meaning + heard,
            "lora": f"scale {lora.scale:.6g}, DoRA {lora.dora}",
        }

    @property
    def encoder_is_frozen(self) -> bool:
        """Whether there is an encoder of which no parameter trains."""
        return self.encoder is not None and not self.trained_parts & {"encoder", "encoder_lora"}

    @property
    def feature_specs(self) -> list[FeatureSpec]:
        """What of a clip is computed once for all trials, if the encoder or its lower layers are frozen."""
        assert self.encoder is not None
        return feature_specs(self.config, self.encoder.states, self.frozen_layers)

    @property
    def has_own_encoder(self) -> bool:
        """Whether weights of the encoder come from a former trial, and not from its folder."""
        return any(name.startswith("encoder.") for name in self.loaded)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = self.llm.get_input_embeddings().weight.device
        return device

    @property
    def pad_tolerance(self) -> int:
        """The number of padding positions that cost less than a second pass over the model."""
        return pad_tolerance(self.device)

    def shard(self, device: str) -> None:
        """Divide the frozen layers of the LLM among the workers of the trial, and move everything else to the device.

        Raises:
            ConfigError: the LLM cannot be divided.
        """
        self.sharding = Sharding(self.llm, device)
        self.to(device)

    def keep_pace(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which workers run the LLM different numbers of times; without sharding it is empty."""
        return contextlib.nullcontext() if self.sharding is None else self.sharding.keep_pace(self.embed)

    def micro_batches(self, costs: Sequence[Cost], token_budget: int, *, pads: bool = False) -> list[list[int]]:
        """Cut a batch into what is computed at once: packed rows, if the LLM packs, or padded batches.

        Args:
            costs: of each example of the batch.
            token_budget: limit on the positions and frames of a part.
            pads: whether the parts are padded in any case.
        """
        if pads or not is_packing(self.llm):
            return micro_batches(costs, token_budget, self.pad_tolerance)
        return packs(costs, token_budget)

    def count_computed(self, costs: Sequence[Cost]) -> int:
        """Return the positions and frames of examples that are computed at once, padding included."""
        if is_packing(self.llm):
            return sum(map(sum, costs))
        return len(costs) * (max(cost.tokens for cost in costs) + max(cost.frames for cost in costs))

    def train(self, mode: bool = True) -> "SpeechLLM":
        """Switch to training, except frozen parts: their dropout stays off."""
        super().train(mode)
        if self.encoder is not None and (self.encoder_is_frozen or self.frozen_layers):
            self.encoder.eval()  # layers above frozen ones have no dropout either
        if not self.trained_parts & {"lora", "llm"}:
            self.llm.eval()
            for layer in llm_layers(self.llm):  # this flag decides whether a layer recomputes its activations
                layer.training = mode and bool(self.config.llm.gradient_checkpointing)
        return self

    def autocast(self) -> torch.autocast:
        """Return a context of mixed precision, if the configuration asks for it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def answer(self, example: Example) -> Answer:
        """Return the tokens of an example's answer."""
        return self.prompt_builder.answer(answer_text(example.task, example.answer))

    def answer_trie(self, example: Example, labels: Iterable[str] = ()) -> LabelTrie:
        """Return the trie of an example's answer, whose path comes first, and of other labels of its task."""
        others = (self.answers[example.task][label] for label in labels if label != example.answer)
        return label_trie([self.answer(example), *others])

    def measure(self, example: Example, n_samples: int, labels: Collection[str] = ()) -> "ExampleSize":
        """Return the size of an example. Reads no audio.

        Args:
            example: may be read without its clip.
            n_samples: length of the clip.
            labels: those that are trained together with the answer.

        Raises:
            MisfitError: the example is longer than the LLM can read, or than model.llm.max_text_tokens.
        """
        prompt, answer = self.prompt_builder.prompt(example), self.answer(example)
        inputs = self.answer_trie(example, labels).nodes if labels else answer.inputs
        cost, frames, clip = Cost(len(prompt.ids) + len(inputs)), 0, 0
        longest = max((len(label.inputs) for label in self.answers[example.task].values()), default=0)
        positions = len(prompt.ids) + max(len(answer.inputs), longest or self.config.max_new_tokens)
        if CLIP in prompt.ids:
            assert self.encoder is not None
            assert self.adapter is not None
            frames = self.encoder.num_frames(n_samples)
            clip = self.adapter.num_embeddings(frames)
            if not clip and isinstance(self.adapter, Adapter):
                rate, least = self.config.adapter.rate, math.ceil(100 * self.adapter.frame_rate / frames) / 100
                raise MisfitError(
                    f"utterance {example.id}: model.adapter.rate {rate:g} leaves no frame of its clip of "
                    f"{n_samples / SAMPLE_RATE:.2f} s; set it to at least {least:g}, or leave out such short clips"
                )
            positions += clip - 1  # one placeholder is replaced
            # A frozen encoder computes clip by clip and mostly once for all trials: its frames do not count in batches.
            encoder_frames = 0 if self.encoder_is_frozen else self.encoder.num_computed_frames(n_samples)
            cost = Cost(cost.tokens + clip - 1, encoder_frames)
        if self.max_positions is not None and positions > self.max_positions:
            raise MisfitError(
                f"utterance {example.id}: prompt and answer take up to {positions} positions ({clip} of them audio), "
                f"but {self.config.llm.path} reads {self.max_positions} at once; lower model.llm.max_text_tokens, "
                "raise model.adapter.stride, or cut the clip"
            )
        return ExampleSize(
            cost=cost,
            predicted=answer.predicted,
            dropped_turns=prompt.dropped_turns,
            short_clip=self.adapter is not None and 0 < frames < self.adapter.window,
        )

    def prompts(self, examples: Sequence[Example]) -> list[Tensor]:
        """Return the unpadded prompt embeddings of each example, [T_i, E]."""
        ids = [self.prompt_builder.prompt(example).ids for example in examples]
        with_clip = [index for index, row in enumerate(ids) if CLIP in row]
        clips = dict(zip(with_clip, self.clips([examples[index] for index in with_clip]), strict=True))
        return [self.embed(row, clips.get(index)) for index, row in enumerate(ids)]

    def clips(self, examples: Sequence[Example]) -> list[Tensor]:
        """Return the embeddings of each example's clip, [T_i, E]."""
        if not examples:
            return []
        assert self.adapter is not None
        assert self.encoder is not None
        if self.encoder_is_frozen:
            return self.adapter.project([torch.cat(self._frozen_features(example), dim=-1) for example in examples])
        embeddings: dict[int, Tensor] = {}
        costs = [self.encoder.num_computed_frames(_n_samples(example)) for example in examples]
        # Which frames are merged is a step function of the frames, which differ in the last digits in another batch.
        alone = self.config.adapter.kind == "merge"
        for group in [[index] for index in range(len(costs))] if alone else groups(costs, self.pad_tolerance):
            embeddings |= zip(group, self._encode([examples[index] for index in group]), strict=True)
        return [embeddings[index] for index in range(len(examples))]

    def _frozen_features(self, example: Example) -> list[Tensor]:
        """Return features_TD of the frozen encoder or of its frozen layers, for each of `feature_specs`.

        They are read from the cache or computed, and rounded in the same way, so a trial gets the same bits.
        """
        assert self.encoder is not None
        if example.features is not None:
            return [on_device(features, self.device).float() for features in example.features]
        assert example.pcm is not None, "items() selects utterances with audio"
        return [features.float() for features in clip_features(self.encoder, example.pcm, self.feature_specs)]

    def _encode(self, examples: Sequence[Example]) -> list[Tensor]:
        """Return the embeddings of clips from an encoder of which at least the upper layers train, in one batch."""
        assert self.encoder is not None
        assert self.adapter is not None
        if self.frozen_layers:
            (start, *_), *heard = self.feature_specs
            hidden, *states = zip(*map(self._frozen_features, examples), strict=True)
            lower = {spec.state: frames for spec, frames in zip(heard, states, strict=True)}
            n_samples = list(map(_n_samples, examples))
            frames_BFD, lengths = self.encoder.forward_from_layer(hidden, n_samples, start, lower)
        else:
            waves = [waveform(example.pcm) for example in examples if example.pcm is not None]
            assert len(waves) == len(examples)
            augments = self.encoder.training and self.config.encoder.spec_augment
            frames_BFD, lengths = self.encoder(waves, self._time_masks(examples, waves) if augments else None)
        embeddings: list[Tensor] = self.adapter(frames_BFD.float(), lengths)
        return embeddings

    def _time_masks(self, examples: Sequence[Example], waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Draw SpecAugment masks (arXiv 1904.08779) from seed, epoch and utterance, whatever the batch is."""
        assert self.encoder is not None
        return [
            draw_time_mask(
                self.encoder.num_frames(len(wave)),
                self.config.encoder.spec_augment,
                np.random.default_rng([*self.augment, zlib.crc32(example.id.encode())]),
            )
            for example, wave in zip(examples, waves, strict=True)
        ]

    def embed(self, ids: Sequence[int], clip_TE: Tensor | None = None) -> Tensor:
        """Return the embeddings [T, E] of token ids and placeholders; CLIP becomes all embeddings of the clip."""
        tokens = on_device(ids, self.device)
        embedded_TE: Tensor = self.llm.get_input_embeddings()(tokens.clamp(min=0))
        vectors = {CLIP: clip_TE, END: self.end_of_audio, CLS: self.cls}
        pieces, start = [], 0
        for index, token in enumerate(ids):
            if token >= 0:
                continue
            vector = vectors[token]
            assert vector is not None
            pieces += [embedded_TE[start:index], vector.to(embedded_TE.dtype).reshape(-1, embedded_TE.shape[1])]
            start = index + 1
        return torch.cat([*pieces, embedded_TE[start:]])


@dataclass(frozen=True)
class ExampleSize:
    """The size of an example, for planning batches and for the report of a trial."""

    cost: Cost
    predicted: int  # tokens of the answer, EOS included
    dropped_turns: int  # turns of history that did not fit
    short_clip: bool  # whether the clip is padded to one window of the adapter


def pad_left(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Pad sequences [T_i, E] on the left and return embeddings_BTE, the attention mask_BT and positions_BT.

    The positions must be passed to the LLM: a forward pass does not derive them from the mask.
    """
    lengths_B = on_device([len(sequence) for sequence in sequences], sequences[0].device)
    embeddings_BTE = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_side="left")
    width = embeddings_BTE.shape[1]
    mask_BT = (torch.arange(width, device=lengths_B.device) >= width - lengths_B[:, None]).long()
    return embeddings_BTE, mask_BT, (mask_BT.cumsum(-1) - 1).clamp(min=0)


def _n_samples(example: Example) -> int:
    """Return the length of an example's clip in samples."""
    return example.n_samples if example.pcm is None else len(example.pcm)

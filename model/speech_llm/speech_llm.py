"""The speech LLM: clips and dialogue in one sequence of embeddings, read by a causal language model with LoRA.

Legend: B examples, T positions of the padded sequence, E width of the LLM.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from data.corpus.audio import waveform
from data.errors import ConfigError, MisfitError
from data.loading.batching import Cost, groups
from data.loading.examples import Example
from data.loading.tasks import AnswerSet
from model.checkpoints import checkpoint
from model.checkpoints.warm_start import chain, check_meaning, placed, start_from
from model.config import ModelConfig
from model.encoders.frozen_features import clip_features, pooling
from model.encoders.loading import SpeechEncoder, load_encoder
from model.encoders.spec_augment import time_mask
from model.parts import check_loaded, part_of, trained_names
from model.runtime.device import on_device, spared
from model.speech_llm.adapter import Adapter, load_adapter
from model.speech_llm.label_trie import LabelTrie, label_trie, shared_beginnings
from model.speech_llm.language_model import adapted_llm, own_tensors, reach, shared_view
from model.speech_llm.prompt import CLIP, CLS, END, Answer, Prompter, written
from model.speech_llm.tokenizer import load_vocabulary


class SpeechLLM(nn.Module):
    """A model for one or several tasks on dialogues whose last turns are read as text, as sound, or both.

    The encoder and the LLM of a process are loaded once; each instance has its own module tree over their frozen
    weights, so instances can be trained one after another without a trace of the former.

    Args:
        config: of the model.
        answers: by task, what may be answered.
        device: "cpu", "cuda", or "meta": all but the weights, to check a configuration and to count parameters.
        encodes: whether examples carry clips; without, they carry features, and the weights of a frozen encoder are
            not loaded.

    Raises:
        ConfigError: a part cannot be loaded, does not fit the others, or is frozen without ever having been loaded.
    """

    def __init__(
        self, config: ModelConfig, answers: Mapping[str, AnswerSet], device: str = "cpu", *, encodes: bool = True
    ) -> None:
        super().__init__()
        self.config = config
        self.tasks = dict(answers)
        self.prompter = Prompter(load_vocabulary(config.llm.path), config)
        self.answers: dict[str, dict[str, Answer]] = {}
        self.tries: dict[str, LabelTrie] = {}
        for task, known in answers.items():
            self.answers[task] = self.prompter.label_answers(task, known.labels)
            self.tries[task] = label_trie(list(self.answers[task].values()))
            alike = shared_beginnings(self.answers[task])
            if config.cls == "after" and alike:
                raise ConfigError(
                    f"model.cls: after cannot tell {alike[0][0]!r} from {alike[0][1]!r}, which begin with the same "
                    f"tokens (tasks.{task}): nothing is predicted where the first one ends; use before or none"
                )

        self.place = device  # as the base models were loaded: torch names it otherwise ("cuda:0")
        self.llm = adapted_llm(config.llm, config.lora, device)
        self.reach = reach(self.llm)
        embedding = self.llm.get_input_embeddings().weight
        self._check_vocabulary(len(embedding))
        self.encoder: SpeechEncoder | None = None
        self.adapter: Adapter | None = None
        fixed: set[str] = set()
        if config.hears:
            encoder = load_encoder(config.encoder.path, device if encodes else "meta", config.encoder.dtype)
            fixed = {f"encoder.{name}" for name, tensor in encoder.named_parameters() if not tensor.requires_grad}
            self.encoder = shared_view(encoder)
            self.adapter = Adapter(encoder.width, embedding.shape[1], config.adapter).to(device)
        self.end_of_audio = self._vector(embedding, config.hears and config.end_of_audio == "learned")
        self.cls = self._vector(embedding, config.cls != "none")
        self.sources = {"encoder": config.encoder.path, "llm": config.llm.path}
        self.parents: list[dict[str, str]] = []
        self.files: dict[str, str] = {}  # digests of what else was loaded, by setting
        trained = trained_names(self, config.patterns, fixed)
        if self.encoder is not None:
            if not encodes and "encoder" in map(part_of, trained):  # its upper layers compute
                self.encoder = shared_view(load_encoder(config.encoder.path, device, config.encoder.dtype))
            self.encoder.set_dropout(config.encoder.dropout)
        self._load(trained)
        self.augment = (0, 0)  # seed and epoch, from which every clip's SpecAugment follows

    @staticmethod
    def _vector(embedding: Tensor, wanted: bool) -> nn.Parameter | None:
        """A learned embedding that starts at the scale of the LLM's own."""
        if not wanted:
            return None
        start = torch.randn(embedding.shape[1])
        scale = 1.0 if embedding.is_meta else embedding.float().std().item()
        return nn.Parameter((start * scale).to(embedding.device))

    def _check_vocabulary(self, rows: int) -> None:
        size = len(self.prompter.vocabulary.tokenizer)
        if size > rows:
            raise ConfigError(
                f"model.llm.path: the tokenizer of {self.config.llm.path} has {size} tokens and the LLM embeds {rows}; "
                "use the tokenizer that belongs to it"
            )

    def _load(self, trained: set[str]) -> None:
        """Fill what shall start from files, and let the chosen parameters train."""
        loaded: set[str] = set()
        if self.adapter is not None and self.config.adapter.init_from is not None:
            path = self.config.adapter.init_from
            names, self.sources["adapter"] = load_adapter(self.adapter, path, self.config.adapter.init_partial)
            loaded |= {f"adapter.{name}" for name in names}
            if not any(name.startswith("adapter.") for name in trained) and not self.adapter.linear.weight.is_meta:
                self.files["model.adapter.init_from"] = checkpoint.digest(self.adapter.state_dict())
        tensors: dict[str, Tensor] = {}
        if self.config.init_from is not None:
            former = chain(self.config.init_from)
            tensors, self.parents = placed(self, former.tensors), former.links
        own_tensors(self, {name for name in trained | tensors.keys() if part_of(name) in ("encoder", "llm")})
        if self.config.init_from is not None:
            names, said = start_from(self, tensors, self.config.init_from, self.config.init_partial)
            loaded |= names
            check_meaning(former, self.meaning(), {part_of(name) for name in names})
            said += f"; trained on corpus {former.fingerprint}"
            self.sources |= {part_of(name): said for name in names}
        self.trained_parts = {part_of(name) for name in trained}
        if "encoder" in self.trained_parts and self.config.encoder.dtype != "float32":
            raise ConfigError(
                f"model.encoder.dtype: {self.config.encoder.dtype} is for an encoder that stays frozen, and "
                f"model.trainable ({self.config.trainable}) trains it; set float32 and model.precision=bfloat16"
            )
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in trained)
            if name in trained and part_of(name) == "llm" and parameter.dtype != torch.float32:
                raise ConfigError(
                    f"model.llm.dtype: {self.config.llm.dtype} is for weights that stay frozen, and model.trainable "
                    f"names {name}; set float32 and model.precision=bfloat16"
                )
        self.frozen_layers = self._frozen_layers()
        self.loaded = loaded
        check_loaded(self, loaded)

    def _frozen_layers(self) -> int:
        """Of an encoder whose upper layers train: those below, which compute clip by clip, as a frozen encoder does.

        0 where there are none, where something is drawn in them, and where nothing of the encoder trains.
        """
        settings = self.config.encoder
        if self.encoder is None or self.encoder_is_frozen or settings.dropout or settings.spec_augment:
            return 0
        return self.encoder.frozen_layers

    def meaning(self) -> dict[str, str]:
        """By part, settings without which its tensors would mean something else in another model."""
        adapter, lora = self.config.adapter, self.config.lora
        ratio = lora.alpha_ratio or lora.alpha / lora.rank
        scale = ratio * lora.rank**0.5 if lora.rslora else ratio
        return {
            "adapter": f"kind {adapter.kind}, window {adapter.window}, stride {adapter.stride}",
            "lora": f"scale {scale:.6g}, DoRA {lora.dora}",
        }

    @property
    def encoder_is_frozen(self) -> bool:
        """Whether there is an encoder none of whose parameters train."""
        return self.encoder is not None and "encoder" not in self.trained_parts

    @property
    def has_own_encoder(self) -> bool:
        """Whether the encoder's weights come from a former trial, and not from its folder."""
        return any(name.startswith("encoder.") for name in self.loaded)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.llm.get_input_embeddings().weight.device
        return device

    @property
    def spared(self) -> int:
        """Positions of padding that cost less than to compute in two parts here."""
        return spared(self.device)

    def train(self, mode: bool = True) -> "SpeechLLM":
        """Switch to training, except parts that are frozen: their dropout stays off."""
        super().train(mode)
        if self.encoder is not None and (self.encoder_is_frozen or self.frozen_layers):
            self.encoder.eval()  # layers above frozen ones have no dropout
        if not self.trained_parts & {"lora", "llm"}:
            self.llm.eval()
            for module in self.llm.modules():  # whose own flag decides whether they keep their activations
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = mode and self.config.llm.gradient_checkpointing
        return self

    def autocast(self) -> torch.autocast:
        """Mixed precision, if the configuration asks for it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def answer(self, example: Example) -> Answer:
        """The tokens of an example's answer."""
        return self.prompter.answer(written(example.task, example.answer))

    def measure(self, example: Example, n_samples: int) -> "Measure":
        """What an example will take. Needs no audio.

        Args:
            example: may be read without its clip.
            n_samples: of the clip.

        Raises:
            MisfitError: it is longer than the LLM's positions reach, or than model.llm.max_text_tokens.
        """
        prompt, answer = self.prompter.prompt(example), self.answer(example)
        cost, frames, clip = Cost(len(prompt.ids) + len(answer.inputs)), 0, 0
        longest = max((len(known.inputs) for known in self.answers[example.task].values()), default=0)
        positions = len(prompt.ids) + max(len(answer.inputs), longest or self.config.max_new_tokens)
        if CLIP in prompt.ids:
            assert self.encoder is not None
            assert self.adapter is not None
            frames = self.encoder.frames(n_samples)
            clip = self.adapter.embeddings(frames)
            positions += clip - 1  # in place of the placeholder
            # What is frozen is computed clip by clip, and mostly once for all trials: it is no matter of batches.
            cost = Cost(cost.tokens + clip - 1, 0 if self.encoder_is_frozen else self.encoder.cost(n_samples))
        if self.reach is not None and positions > self.reach:
            raise MisfitError(
                f"utterance {example.id}: prompt and answer take up to {positions} positions ({clip} of them sound), "
                f"and {self.config.llm.path} reads {self.reach} at once; lower model.llm.max_text_tokens, raise "
                "model.adapter.stride, or cut the clip"
            )
        return Measure(
            cost=cost,
            predicted=answer.predicted,
            dropped_turns=prompt.dropped_turns,
            short_clip=0 < frames < self.config.adapter.window,
        )

    def prompts(self, examples: Sequence[Example]) -> list[Tensor]:
        """The unpadded prompt embeddings of each example, [T_i, E]."""
        ids = [self.prompter.prompt(example).ids for example in examples]
        hearing = [place for place, row in enumerate(ids) if CLIP in row]
        clips = dict(zip(hearing, self.clips([examples[place] for place in hearing]), strict=True))
        return [self.embed(row, clips.get(place)) for place, row in enumerate(ids)]

    def clips(self, examples: Sequence[Example]) -> list[Tensor]:
        """The embeddings of each example's clip."""
        if not examples:
            return []
        assert self.adapter is not None
        assert self.encoder is not None
        if self.encoder_is_frozen:
            return self.adapter.project([self._features(example) for example in examples])
        found: dict[int, Tensor] = {}
        for group in groups([self.encoder.cost(_samples(example)) for example in examples], self.spared):
            found |= zip(group, self._encoded([examples[place] for place in group]), strict=True)
        return [found[place] for place in range(len(examples))]

    def _features(self, example: Example) -> Tensor:
        """Those of a frozen encoder, or of its frozen layers, [T, D]: read, or computed and rounded alike."""
        assert self.encoder is not None
        if example.features is not None:
            return on_device(example.features, self.device).float()
        assert example.pcm is not None, "items() selects utterances with sound"
        kept = self.frozen_layers, pooling(self.config, self.frozen_layers)
        return clip_features(self.encoder, example.pcm, [kept])[0].float()

    def _encoded(self, examples: Sequence[Example]) -> list[Tensor]:
        """Of an encoder that trains, or whose upper layers do; all clips are padded to the longest one."""
        assert self.encoder is not None
        assert self.adapter is not None
        if self.frozen_layers:
            hidden = [self._features(example) for example in examples]
            frames_BFD, lengths_B = self.encoder.rest(hidden, list(map(_samples, examples)), self.frozen_layers)
        else:
            waves = [waveform(example.pcm) for example in examples if example.pcm is not None]
            assert len(waves) == len(examples)
            learns = self.encoder.training and self.config.encoder.spec_augment
            frames_BFD, lengths_B = self.encoder(waves, self._masks(examples, waves) if learns else None)
        embedded: list[Tensor] = self.adapter(frames_BFD.float(), lengths_B)
        return embedded

    def _masks(self, examples: Sequence[Example], waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """SpecAugment (arXiv 1904.08779), drawn for each utterance by itself, whatever it is batched with."""
        assert self.encoder is not None
        return [
            time_mask(
                self.encoder.frames(len(wave)),
                self.config.encoder.spec_augment,
                np.random.default_rng([*self.augment, zlib.crc32(example.id.encode())]),
            )
            for example, wave in zip(examples, waves, strict=True)
        ]

    def embed(self, ids: Sequence[int], clip_TE: Tensor | None = None) -> Tensor:
        """Token ids and placeholders → embeddings [T, E]; the clip's placeholder becomes as many as it has."""
        tokens = on_device(ids, self.device)
        embedded: Tensor = self.llm.get_input_embeddings()(tokens.clamp(min=0))
        vectors: dict[int, Any] = {CLIP: clip_TE, END: self.end_of_audio, CLS: self.cls}
        pieces, start = [], 0
        for place, token in enumerate(ids):
            if token >= 0:
                continue
            pieces += [embedded[start:place], vectors[token].to(embedded.dtype).reshape(-1, embedded.shape[1])]
            start = place + 1
        return torch.cat([*pieces, embedded[start:]])


def _samples(example: Example) -> int:
    """Of the clip that is heard."""
    return example.n_samples if example.pcm is None else len(example.pcm)


@dataclass(frozen=True)
class Measure:
    """Of an example, for planning and for what is counted."""

    cost: Cost
    predicted: int  # tokens of the answer, EOS included
    dropped_turns: int  # turns of history that did not fit
    short_clip: bool  # filled up with silence to one window of the adapter


def pad_left(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Unpadded sequences [T_i, E] → embeddings_BTE, attention mask_BT and positions_BT, padded once, on the left.

    Positions are always given: a forward pass does not derive them from the mask by itself.
    """
    lengths_B = torch.tensor([len(sequence) for sequence in sequences], device=sequences[0].device)
    embeddings_BTE = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_side="left")
    width = embeddings_BTE.shape[1]
    mask_BT = (torch.arange(width, device=lengths_B.device) >= width - lengths_B[:, None]).long()
    return embeddings_BTE, mask_BT, (mask_BT.cumsum(-1) - 1).clamp(min=0)

"""The speech LLM: clips and dialogue in one sequence of embeddings, read by a causal LM with LoRA; labels are scored.

Legend: B examples, T positions of the padded sequence, E width of the LLM, V vocabulary, K labels, N trie nodes,
L positions whose logits are needed.
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from data.audio import waveform
from data.errors import ConfigError, reason
from data.examples import Example
from model.adapter import PoolLinear, clip_list
from model.config import LoraSettings, ModelConfig
from model.encoder import SpeechEncoder, encoder_kind, load_encoder
from model.prompt import CLIP, CLS, END, IGNORE, Prompt, Prompter, label_trie, load_vocabulary


class SpeechLLM(nn.Module):
    """Scores the labels of utterances that are read as text, as sound, or both.

    The encoder and the LLM of a process are loaded once; each instance has its own module tree over their frozen
    weights, so instances can be trained one after another without a trace of the former.
    """

    def __init__(self, config: ModelConfig, labels: Sequence[str], device: str = "cpu") -> None:
        super().__init__()
        self.config = config
        self.labels = tuple(labels)
        self.prompter = Prompter(load_vocabulary(config.llm.path), config)
        self.answers = {label: self.prompter.answer(label) for label in self.labels}
        self.trie = label_trie(list(self.answers.values()))

        llm = shared_view(load_llm(config.llm.path, config.llm.dtype, device))
        self.llm = _with_lora(llm, config.lora) if config.lora.enabled else llm
        embedding = self.llm.get_input_embeddings().weight
        self.encoder: SpeechEncoder | None = None
        self.adapter: PoolLinear | None = None
        if config.hears:
            encoder = load_encoder(config.encoder.path, device)
            own = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
            self.encoder = shared_view(encoder, own if config.encoder.trainable else set())
            pooling = (config.adapter.pool, config.adapter.stride)
            self.adapter = PoolLinear(encoder.width, embedding.shape[1], *pooling).to(device)
            self.adapter.requires_grad_(config.adapter.trainable)
        self.end_of_audio = self._vector(embedding, config.hears and config.end_of_audio == "learned")
        self.cls = self._vector(embedding, config.cls != "none")

    @staticmethod
    def _vector(embedding: Tensor, wanted: bool) -> nn.Parameter | None:
        """A learned embedding that starts at the scale of the LLM's own."""
        if not wanted:
            return None
        start = torch.randn(embedding.shape[1]) * embedding.float().std().item()
        return nn.Parameter(start.to(embedding.device))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.llm.get_input_embeddings().weight.device
        return device

    def train(self, mode: bool = True) -> "SpeechLLM":
        """Switch to training, except parts that are frozen: their dropout stays off."""
        super().train(mode)
        if self.encoder is not None and not self.config.encoder.trainable:
            self.encoder.eval()
        if not self.config.lora.enabled:
            self.llm.eval()
        return self

    def cost(self, prompt: Prompt, n_samples: int) -> int:
        """Tokens and encoder frames of an example: what planning and memory go by. Needs no audio."""
        return len(prompt.ids) + (self.encoder.cost(n_samples) if self.encoder is not None else 0)

    def loss(self, examples: Sequence[Example]) -> tuple[Tensor, int]:
        """Next-token loss of the answers.

        Returns:
            The sum of the negative log-probabilities (nats) of the label tokens and EOS, and their number.
        """
        answers = [self.answers[example.label] for example in examples]
        sequences = [
            torch.cat([prompt, self._embed(answer.inputs)])
            for prompt, answer in zip(self._prompts(examples), answers, strict=True)
        ]
        embeddings_BTE, mask_BT, positions_BT = pad_left(sequences)
        kept = max(len(answer.targets) for answer in answers)
        logits_BLV = self.llm(
            inputs_embeds=embeddings_BTE,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            use_cache=False,
            logits_to_keep=kept,
        ).logits
        rows = [[IGNORE] * (kept - len(answer.targets)) + list(answer.targets) for answer in answers]
        targets_BL = torch.tensor(rows, device=self.device)
        total = nn.functional.cross_entropy(
            logits_BLV.float().flatten(0, 1), targets_BL.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        return total, sum(target != IGNORE for row in rows for target in row)

    @torch.no_grad()
    def score(self, examples: Sequence[Example]) -> Tensor:
        """Log-probability (nats) of every label string followed by EOS.

        The prompt is read once; then one forward pass over the trie of all labels scores them together.

        Returns:
            scores_BK, in the order of `labels`.
        """
        embeddings_BTE, mask_BT, positions_BT = pad_left(self._prompts(examples))
        cache = DynamicCache(config=self.llm.config)
        first_B1V = self.llm(
            inputs_embeds=embeddings_BTE,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        batch, nodes = len(examples), len(self.trie.nodes)
        ancestors_NN = torch.tensor(self.trie.ancestors, device=self.device)
        seen = torch.cat(
            [mask_BT.bool()[:, None].expand(-1, nodes, -1), ancestors_NN.expand(batch, -1, -1)], dim=-1
        )  # [B, N, T+N]
        lowest = torch.finfo(embeddings_BTE.dtype).min
        bias = torch.zeros(seen.shape, dtype=embeddings_BTE.dtype, device=self.device).masked_fill(~seen, lowest)
        depth_N = ancestors_NN.sum(-1) - 1
        rest_BNV = self.llm(
            inputs_embeds=self._embed(self.trie.nodes).expand(batch, -1, -1),
            attention_mask=bias[:, None],
            position_ids=mask_BT.sum(-1, keepdim=True) + depth_N,
            past_key_values=cache,
            use_cache=True,
        ).logits
        logp_BNV = torch.cat([first_B1V, rest_BNV], dim=1).float().log_softmax(-1)
        columns = [
            torch.stack([logp_BNV[:, node + 1, target] for node, target in path]).sum(0) for path in self.trie.paths
        ]
        return torch.stack(columns, dim=1)

    def _prompts(self, examples: Sequence[Example]) -> list[Tensor]:
        """The unpadded prompt embeddings of each example, [T_i, E]."""
        clips = self._clips(examples) if self.encoder is not None else [None] * len(examples)
        sequences = []
        for example, clip in zip(examples, clips, strict=True):
            sequences.append(self._embed(self.prompter.prompt(example).ids, clip))
        return sequences

    def _clips(self, examples: Sequence[Example]) -> list[Tensor]:
        assert self.encoder is not None
        assert self.adapter is not None
        waves = [waveform(example.pcm) for example in examples if example.pcm is not None]
        assert len(waves) == len(examples), "targets() selects utterances with sound"
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.encoder.trainable):
            frames_BFD, lengths_B = self.encoder(waves)
        return clip_list(*self.adapter(frames_BFD, lengths_B))

    def _embed(self, ids: Sequence[int], clip_TE: Tensor | None = None) -> Tensor:
        """Token ids and placeholders → embeddings [T, E]; the clip's placeholder becomes as many as it has."""
        tokens = torch.tensor(ids, device=self.device)
        embedded: Tensor = self.llm.get_input_embeddings()(tokens.clamp(min=0))
        vectors = {CLIP: clip_TE, END: self.end_of_audio, CLS: self.cls}
        pieces, start = [], 0
        for place, token in enumerate(ids):
            if token >= 0:
                continue
            vector = vectors[token]
            assert vector is not None
            pieces += [embedded[start:place], vector.to(embedded.dtype).reshape(-1, embedded.shape[1])]
            start = place + 1
        return torch.cat([*pieces, embedded[start:]])


def pad_left(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Unpadded sequences [T_i, E] → embeddings_BTE, attention mask_BT and positions_BT, padded once, on the left.

    Positions are always given: a forward pass does not derive them from the mask by itself.
    """
    lengths_B = torch.tensor([len(sequence) for sequence in sequences], device=sequences[0].device)
    embeddings_BTE = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_side="left")
    width = embeddings_BTE.shape[1]
    mask_BT = (torch.arange(width, device=lengths_B.device) >= width - lengths_B[:, None]).long()
    return embeddings_BTE, mask_BT, (mask_BT.cumsum(-1) - 1).clamp(min=0)


def shared_view(base: Any, own: frozenset[str] | set[str] = frozenset()) -> Any:
    """A copy of a module tree that shares the frozen tensors of `base`; those named in `own` are cloned and train.

    Modules, hooks and flags are fresh, so that nothing done to the copy (LoRA layers, `requires_grad`) stays behind.
    """
    memo: dict[int, Any] = {}
    for name, parameter in base.named_parameters():
        data = parameter.detach().clone() if name in own else parameter.detach()
        memo[id(parameter)] = nn.Parameter(data, requires_grad=name in own)
    return copy.deepcopy(base, memo)


@functools.lru_cache(maxsize=1)
def load_llm(path: str, dtype: str, device: str) -> nn.Module:
    """Load a causal language model once per process, frozen.

    Raises:
        ConfigError: nothing can be loaded from `path`, an id or a folder in Hugging Face format.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.llm.path: cannot load a causal LM from {path}: {reason(error)}") from None
    return model.to(device).requires_grad_(False).eval()  # type: ignore[no-any-return]


def check_model(config: ModelConfig) -> None:
    """What can be known to be wrong with a model from its folders, without loading weights.

    Raises:
        ConfigError: encoder, tokenizer or LLM cannot be found, or a LoRA target matches nothing.
    """
    load_vocabulary(config.llm.path)
    if config.hears:
        encoder_kind(config.encoder.path)
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.llm.path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.llm.path: no causal LM at {config.llm.path}: {reason(error)}") from None
    if config.lora.enabled:
        _check_targets(skeleton, config.lora)


def _check_targets(llm: nn.Module, settings: LoraSettings) -> None:
    known = {name.rsplit(".", 1)[-1] for name, module in llm.named_modules() if isinstance(module, nn.Linear)}
    unknown = [] if settings.targets == "all-linear" else [name for name in settings.targets if name not in known]
    if unknown:
        raise ConfigError(
            f"model.lora.targets: {', '.join(unknown)} match no linear layer; the LLM has {', '.join(sorted(known))}"
        )


def _with_lora(llm: nn.Module, settings: LoraSettings) -> Any:
    _check_targets(llm, settings)
    return get_peft_model(
        llm,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=settings.targets,
        ),
    )

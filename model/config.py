"""Settings of the model and of its training."""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from data.config import Section, Weight

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
ByLabel = dict[str, dict[str, Positive]]  # task → label → number
NEW_PARTS = ("adapter", "lora", "tokens", "encoder_lora")  # parts that no pretrained model holds: they start at random
# Version of the models that `model.tiny` makes, here because naming them needs no torch. It is part of every cache key:
# raise it when a saved model changes.
TINY_VERSION = "2"
TOKEN_BUDGET = 16_384  # of `train.token_budget: auto` where nothing was measured
Dtype = Literal["float32", "bfloat16"]
Packing = Literal["auto", "on", "off"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
LoadIn = Literal["none", "8bit", "4bit"]
LayerIndex = Annotated[int, Field(ge=0)]
Layers = Literal["last", "weighted"] | LayerIndex | Annotated[list[LayerIndex], Field(min_length=1)]


def _list_of_one(value: object) -> object:
    return [value] if isinstance(value, str) and value != "all-linear" else value


Targets = Annotated[
    Annotated[list[str], Field(min_length=1)] | Literal["all-linear"], BeforeValidator(_list_of_one)
]  # linear layers that LoRA adapts


class EncoderLora(Section):
    """Low-rank adaptation of the encoder (Hu et al., 2021, arXiv 2106.09685)."""

    rank: Annotated[int, Field(ge=0)] = Field(0, description="Rank r of the update; 0: the encoder is not adapted.")
    alpha: Positive = Field(32, description="The update is multiplied by alpha / rank.")
    alpha_ratio: Positive | None = Field(
        None, description="alpha / rank, which replaces alpha: the same scale at any rank."
    )
    targets: Targets = Field(
        ["q_proj", "v_proj"],
        description="Names of the linear layers that are adapted, or all-linear. Conformers name theirs linear_q and "
        "linear_v.",
    )
    layers: Count | None = Field(
        None,
        description="Number of upper layers that are adapted, counted down from the highest one that is heard; null: "
        "all. The layers below are frozen, and computed once for all trials.",
    )


class EncoderConfig(Section):
    """The encoder: HuBERT, wav2vec 2.0, WavLM, wav2vec2-conformer, w2v-BERT, Whisper, or that of an audio LLM."""

    path: str | None = Field(
        "builtin:tiny-whisper",
        description="Hugging Face id, local folder, or builtin:tiny-whisper. null: the encoder and the projector of "
        "model.llm.path, an audio LLM (Qwen2-Audio, Granite Speech).",
    )
    dtype: Dtype = Field("float32", description="Type of the weights; an encoder that trains needs float32.")
    context: Literal["window", "clip"] = Field(
        "window",
        description="What Whisper computes for a clip. window: 30 s, with the silence behind the clip, as it was "
        "pre-trained. clip: the clip's own frames, which takes less time and gives other frames.",
    )
    layers: Layers = Field(
        "last",
        description="Which layer's output is heard. last: that of the last layer, behind the final norm. N: that of "
        "layer N, counted from 1; 0: the input of the first layer. [N, M]: of several, side by side. weighted: the sum "
        "of all, 0 included, with learned weights (SUPERB, arXiv 2105.01051). Layers above those heard are left out.",
    )

    lora: EncoderLora = EncoderLora()

    @field_validator("layers")
    @classmethod
    def _ascending(cls, value: Layers) -> Layers:
        if isinstance(value, list) and value != sorted(set(value)):
            raise ValueError("list the layers in ascending order, each once")
        return value

    dropout: Fraction = Field(
        0.0,
        description="Probability of every dropout in the encoder, if it trains. The draws depend on how an optimizer "
        "step is cut into micro-batches.",
    )
    spec_augment: Fraction = Field(
        0.0, description="Share of a clip's frames that SpecAugment masks in training, if the encoder trains."
    )


class AdapterConfig(Section):
    """From encoder frames to LLM embeddings: the frames are reduced to fewer vectors, which are projected."""

    kind: Literal["pool", "stack", "conv", "queries", "merge"] = Field(
        "pool",
        description="How frames are reduced. pool: each window to the average of its frames. stack: to its frames side "
        "by side. conv: by a convolution. queries: learned queries read them by attention (Q-Former). merge: "
        "neighbouring frames that are similar are averaged.",
    )
    window: Count = Field(8, description="Number of frames that make one embedding.")
    stride: Count = Field(4, description="Frames between two embeddings (50 frames/s / 4 = 12.5 embeddings/s).")
    rate: Positive = Field(
        12.5, description="Embeddings for a second of audio, of merge, and of queries without a fixed number of them."
    )
    queries: Count | None = Field(
        None,
        description="Number of queries that read a whole clip; null: one query reads each window of 1 / rate seconds.",
    )
    query_layers: Count = Field(2, description="Number of layers of queries.")
    hidden: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Width of the hidden layer of an MLP; 0 projects with one linear layer. Of queries, the width of "
        "their layers; 0: that of the frames.",
    )

    @property
    def has_windows(self) -> bool:
        """Whether `window` and `stride` say how many embeddings a clip has."""
        return self.kind in ("pool", "stack", "conv")

    @property
    def has_rate(self) -> bool:
        """Whether `rate` says how many embeddings a clip has."""
        return self.kind == "merge" or (self.kind == "queries" and self.queries is None)

    @property
    def meaning(self) -> str:
        """The settings without which the adapter's weights are useless, in words."""
        if self.has_windows:
            return f"kind {self.kind}, window {self.window}, stride {self.stride}"
        return f"kind {self.kind}, " + (f"rate {self.rate:g}" if self.has_rate else f"{self.queries} queries")

    init_from: str | None = Field(
        None, description="File of initial weights: safetensors, a torch file, or a trial's checkpoint.pt."
    )
    init_partial: bool = Field(False, description="Allow init_from or the adapter to have tensors that do not match.")


class LoraSettings(Section):
    """Low-rank adaptation of the LLM (Hu et al., 2021, arXiv 2106.09685)."""

    enabled: bool = Field(True, description="Whether the LLM is adapted; if not, it stays as it was published.")
    rank: Count = Field(8, description="Rank r of the update.")
    alpha: Positive = Field(32, description="The update is multiplied by alpha / rank.")
    alpha_ratio: Positive | None = Field(
        None, description="alpha / rank, which replaces alpha: the same scale at any rank."
    )
    dropout: Fraction = Field(0.1, description="Dropout on the input of the update.")
    targets: Targets = Field(
        "all-linear",  # a lower validation loss than attention alone at equal parameters: docs/results.md
        description="Names of the linear layers that are adapted, or all-linear. Fused experts of a mixture of experts "
        "are no linear layers: name them by their last two names, e.g. experts.down_proj, without dropout and DoRA.",
    )
    init_from: str | None = Field(
        None,
        description="Folder of a PEFT adapter (adapter_config.json and weights) that LoRA starts from; rank, scale and "
        "targets must be those of the adapter.",
    )

    rslora: bool = Field(False, description="Multiply the update by alpha / sqrt(rank) instead (arXiv 2312.03732).")
    dora: bool = Field(False, description="Learn the magnitude and the direction separately (arXiv 2402.09353).")

    @property
    def scale(self) -> float:
        """The factor of the update."""
        ratio = self.alpha_ratio or self.alpha / self.rank
        return ratio * self.rank**0.5 if self.rslora else ratio


class LLMConfig(Section):
    """The language model that reads the dialogue."""

    path: str = Field("builtin:tiny-llama", description="Hugging Face id, local folder, or builtin:tiny-llama.")
    dtype: Dtype = Field("float32", description="Type of the frozen weights; weights that train need float32.")
    load_in: LoadIn = Field(
        "none",
        description="How the frozen weights of linear layers are stored (bitsandbytes). 4bit: NF4 with double "
        "quantization (QLoRA, arXiv 2305.14314). 8bit: integers with a scale for each row. none: in dtype. Products "
        "are computed in dtype in any case.",
    )
    attention: Attention = Field(
        "auto",
        description="Implementation of attention: that of torch (sdpa), plain matrix products (eager), or the package "
        "flash_attn, on a GPU in bfloat16. auto: what transformers chooses for the family. Results are the same.",
    )
    max_text_tokens: Count = Field(
        512,
        description="Largest number of text tokens in a prompt. The oldest turns of a longer one are dropped, and the "
        "dropped turns are counted.",
    )
    gradient_checkpointing: bool | Count = Field(
        False,
        description="Compute activations of layers again in the backward pass instead of storing them. true: of all "
        "layers; a number: of as many, the first ones.",
    )


class PromptConfig(Section):
    """How a dialogue is written. `sweep inspect` prints the result."""

    format: Literal["plain", "chat"] = Field(
        "plain", description="plain: text alone. chat: the chat template of the tokenizer."
    )
    instruction: str | None = Field(
        None,
        description="Text before the dialogue. task: the instruction of the task. null: none. Anything else is written "
        "as it is.",
    )
    bos: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Start of a plain prompt. auto: what the tokenizer puts in front of every text, which is BOS for "
        "most models and nothing for others. always: its BOS, if it has one. never: nothing. A chat template writes "
        "its start itself.",
    )
    roles: dict[str, str] = Field({}, description="Names for the roles of the corpus, e.g. {client: Patient}.")
    separator: str = Field("\n", description="Text after every turn, e.g. a line break or ' [SEP] '.")
    order: Literal["text-sound", "sound-text"] = Field(
        "text-sound", description="Order of text and audio in a turn that is read as both."
    )

    @field_validator("separator", mode="before")
    @classmethod
    def _no_list(cls, value: object) -> object:
        if isinstance(value, list):
            raise ValueError("brackets make a list in YAML; quote them, as in ' [SEP] '")
        return value

    history_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Largest number of tokens of the turns before the last one; null: as many as fit."
    )


class ModelConfig(Section):
    """A speech LLM: encoder → adapter → LLM with LoRA."""

    modality: Literal["text", "speech", "text+speech"] = Field(
        "speech", description="How the last turn with audio is read; all other turns are read as text."
    )
    trainable: str = Field(
        "new",
        description="The parts that train, joined with +: encoder, adapter, lora, tokens (the learned vectors), llm, "
        "encoder_lora, new (for adapter+lora+tokens+encoder_lora), or patterns of parameter names such as "
        "encoder.*.layers.11.*; `sweep inspect` shows what they match.",
    )
    encoder: EncoderConfig = EncoderConfig()
    adapter: AdapterConfig = AdapterConfig()
    llm: LLMConfig = LLMConfig()
    lora: LoraSettings = LoraSettings()
    prompt: PromptConfig = PromptConfig()
    end_of_audio: Literal["none", "learned"] = Field(
        "none", description="Whether a learned vector follows the embeddings of the clip."
    )
    cls: Literal["none", "before", "after"] = Field(
        "none", description="Position of a learned [CLS] vector: before the answer, or after it and before EOS."
    )
    init_from: str | None = Field(
        None,
        description="A former trial (its folder, or a checkpoint.pt) whose trained tensors are the initial weights.",
    )
    init_partial: bool = Field(False, description="Allow tensors of init_from that have no counterpart in this model.")
    precision: Dtype = Field("float32", description="bfloat16: mixed precision (autocast) in training and in scoring.")
    priors: Literal["as-is", "balanced"] = Field(
        "as-is", description="balanced: label scores are divided by the shares of the labels in training."
    )
    max_new_tokens: Count = Field(
        64, description="Largest number of tokens of a generated reply; a longer one is cut and counted as run-on."
    )

    @field_validator("trainable", mode="before")
    @classmethod
    def _join(cls, value: object) -> object:
        return "+".join(map(str, value)) if isinstance(value, list) else value

    @property
    def uses_audio(self) -> bool:
        """Whether audio is part of the input."""
        return self.modality != "text"

    @property
    def encoder_path(self) -> str:
        """The pretrained model that has the encoder."""
        return self.llm.path if self.encoder.path is None else self.encoder.path

    @property
    def patterns(self) -> list[str]:
        """The parts and patterns of `trainable`."""
        parts = [part.strip() for part in self.trainable.split("+") if part.strip()]
        return [name for part in parts for name in (NEW_PARTS if part == "new" else (part,))]

    def problems(self) -> list[str]:
        """Return violated rules that span several settings, each as a line with the key, the value and the fix."""
        problems = []
        if self.adapter.has_windows and self.adapter.stride > self.adapter.window:
            problems.append(
                f"model.adapter.stride: {self.adapter.stride} is larger than model.adapter.window "
                f"({self.adapter.window}), so frames would be skipped; lower it"
            )
        if self.encoder.path is None:
            problems += self._problems_of_audio_llm()
        if self.lora.init_from is not None and not self.lora.enabled:
            problems.append(
                f"model.lora.init_from: {self.lora.init_from} has no effect with model.lora.enabled=false; remove one"
            )
        if self.llm.load_in != "none" and "llm" in self.patterns:
            problems.append(
                f"model.llm.load_in: {self.llm.load_in} is for an LLM that stays frozen, and model.trainable "
                f"({self.trainable}) trains it; set none, or take llm out"
            )
        if not self.patterns:
            problems.append(f"model.trainable: {self.trainable!r} names no part; name one, e.g. adapter+lora")
        adapts = self.encoder.lora.rank > 0
        if ("encoder" in self.patterns or adapts) and self.encoder.dtype != "float32":
            fix = "set model.encoder.lora.rank=0" if adapts else "take the encoder out of model.trainable"
            problems.append(
                f"model.encoder.dtype: {self.encoder.dtype} is for an encoder that stays frozen; set float32 and "
                f"model.precision=bfloat16, or {fix}"
            )
        # A pattern that begins with a wildcard may match the encoder; that is known when the model has been built.
        others = [pattern for pattern in self.patterns if pattern != "encoder_lora"]
        may_train_encoder = adapts or any(pattern.startswith(("encoder", "*", "?", "[")) for pattern in others)
        for name in ("spec_augment", "dropout"):
            value = getattr(self.encoder, name)
            if value and not may_train_encoder:
                problems.append(
                    f"model.encoder.{name}: {value} has no effect on an encoder that stays frozen; set 0, or add "
                    "encoder to model.trainable"
                )
        return problems

    def _problems_of_audio_llm(self) -> list[str]:
        """Return the settings that an audio LLM decides itself, each as a line."""
        fixed: list[tuple[str, Section, Iterable[str]]] = [
            ("model.adapter", self.adapter, AdapterConfig.model_fields),
            ("model.encoder", self.encoder, ("context", "layers")),
        ]
        return [
            f"{section}.{name}: {value} has no effect on an audio LLM (model.encoder.path=null), whose encoder and "
            f"projector are its own; leave it out"
            for section, settings, names in fixed
            for name in names
            if (value := getattr(settings, name)) != type(settings).model_fields[name].default
        ]


class LossConfig(Section):
    """What training minimises at the positions that predict the answer. A loss of weight 0 is not computed."""

    next_token: Weight = Field(1.0, description="Weight of the cross-entropy of the answer's tokens.")
    distillation: Weight = Field(
        0.0,
        description="Weight of the divergence from the same LLM reading the transcript (arXiv 2406.05968), over its 64 "
        "likeliest tokens and all other tokens as one.",
    )
    temperature: Positive = Field(
        1.0, description="Temperature of the distillation; its loss is multiplied by the square."
    )
    hidden: Weight = Field(
        0.0, description="Weight of the mean squared distance between the last hidden states of model and teacher."
    )


class LearningRates(Section):
    """Peak learning rates of parts that differ from train.learning_rate."""

    encoder: Positive | None = None
    adapter: Positive | None = None
    lora: Positive | None = None
    tokens: Positive | None = None
    encoder_lora: Positive | None = None


class TrainConfig(Section):
    """How a trial is trained."""

    epochs: Count = Field(5, description="Passes over the training split; each ends with an evaluation and a report.")
    patience: Count | None = Field(
        None,
        description="Number of epochs without a lower validation loss after which training ends; null: it never ends "
        "early.",
    )
    keep: Literal["last", "best"] = Field(
        "last",
        description="The epoch whose weights, metrics and predictions are a trial's result: the last one, or the best "
        "one by search.metric on the validation split.",
    )
    batch_size: Count = Field(16, description="Items in an optimizer step, over all workers.")
    learning_rate: Positive = Field(1e-3, description="Peak of AdamW's learning rate.")
    learning_rates: LearningRates = LearningRates()
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear",
        description="The learning rate after the warm-up: linear or cosine decay to zero, or constant.",
    )
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="AdamW's decoupled weight decay."
    )
    warmup: Fraction = Field(0.1, description="Share of the steps in which the learning rate rises to its peak.")
    max_grad_norm: Positive = Field(1.0, description="Norm to which gradients are clipped.")
    losses: LossConfig = LossConfig()
    labels: Literal["majority", "votes"] = Field(
        "majority",
        description="What tasks with codes train on where several annotators coded a turn. majority: their label. "
        "votes: the share of each label among them; a turn of one annotator is trained as before.",
    )
    class_weights: Literal["equal", "balanced"] | ByLabel = Field(
        "equal",
        description="Weight of an item's loss. balanced: inverse to the share of its label in training, n / (K n_k). "
        "Or numbers, {task: {label: weight}}; labels without a number have weight 1.",
    )
    sampling: Literal["none", "balanced"] | ByLabel = Field(
        "none",
        description="How the items of an epoch are drawn. none: every item once. balanced: with replacement, as many "
        "as there are, and the labels of a task equally often. Or numbers, {task: {label: weight}}: with replacement, "
        "in proportion to the weight.",
    )
    token_budget: Count | Literal["auto"] = Field(
        "auto",
        description="Tokens and encoder frames computed at once (longest x count). auto: on a GPU as many as the dry "
        "run of a sweep finds room for, elsewhere 16384. Memory depends on it; the result does not, in float32 and "
        "without dropout, whose draws depend on how a step is cut.",
    )
    packing: Packing = Field(
        "auto",
        description="Whether the examples of a micro-batch are laid end to end, without padding. auto: on a GPU in "
        "half precision, if the LLM's family can. on: also elsewhere, or an error. off: they are padded. The result is "
        "the same in float32 and without dropout.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether training runs the LLM's layers compiled (torch.compile), which takes a minute or more in "
        "each worker once. auto: in a sweep on a GPU, if a trial is estimated to train for a quarter of an hour. The "
        "result is the same up to rounding.",
    )
    kernels: Literal["torch", "liger"] = Field(
        "torch",
        description="What computes the LLM's norms and gated feed-forward layers. liger: the kernels of liger-kernel "
        "(an extra), on a GPU.",
    )
    checkpoint_steps: Count = Field(
        500, description="Largest number of optimizer steps between checkpoints within an epoch."
    )
    checkpoint_seconds: Positive = Field(
        300, description="Longest time in seconds between checkpoints within an epoch, up to the end of a step."
    )

    @property
    def initial_token_budget(self) -> int:
        """The token budget of a training or an evaluation for which no dry run has found one."""
        return TOKEN_BUDGET if self.token_budget == "auto" else self.token_budget

    @property
    def has_teacher(self) -> bool:
        """Whether the base LLM has to read the transcript."""
        return self.losses.distillation + self.losses.hidden > 0

    def problems(self) -> list[str]:
        """Return violated rules that span several settings, as `ModelConfig.problems` does."""
        losses, problems = self.losses, []
        if losses.next_token + losses.distillation + losses.hidden == 0:
            problems.append("train.losses: all weights are 0, so there is nothing to minimise; raise one")
        if self.labels == "votes" and losses.next_token == 0:
            problems.append(
                "train.labels: votes has no effect with train.losses.next_token=0, which is the loss that reads "
                "labels; raise it, or set majority"
            )
        if self.sampling != "none" and self.class_weights != "equal":
            sampling, weights = (
                setting if isinstance(setting, str) else "numbers by label"
                for setting in (self.sampling, self.class_weights)
            )
            problems.append(
                f"train.sampling: {sampling} already weights labels, and train.class_weights ({weights}) would weight "
                "them again; set one of them to none or equal"
            )
        return problems

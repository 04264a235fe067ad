"""Settings of the model and of its training."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from data.config import Section, Weight

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
ByLabel = dict[str, dict[str, Positive]]  # task → label → number
NEW_PARTS = ("adapter", "lora", "tokens")  # they start at random: a pretrained model does not hold them
Dtype = Literal["float32", "bfloat16"]


class EncoderConfig(Section):
    """The speech encoder: HuBERT, wav2vec 2.0, WavLM, wav2vec2-conformer, w2v-BERT or Whisper."""

    path: str = Field("builtin:tiny-whisper", description="Hugging Face id or folder, or builtin:tiny-whisper.")
    dtype: Dtype = Field("float32", description="Of its weights; one that trains keeps float32.")
    dropout: Fraction = Field(0.0, description="Everywhere in it, if it trains; draws follow how a step is cut.")
    spec_augment: Fraction = Field(
        0.0, description="Share of a clip's frames that are masked in training, if the encoder trains."
    )


class AdapterConfig(Section):
    """From encoder frames to LLM embeddings: windows of frames are reduced to one vector, which is then projected."""

    kind: Literal["pool", "stack", "conv"] = Field(
        "pool", description="pool: average of the window. stack: its frames side by side. conv: a convolution."
    )
    window: Count = Field(8, description="Frames that make one embedding.")
    stride: Count = Field(4, description="Frames between two embeddings (50 frames/s / 4 = 12.5 embeddings/s).")
    hidden: Annotated[int, Field(ge=0)] = Field(0, description="Width of an MLP's hidden layer; 0: one linear layer.")
    init_from: str | None = Field(None, description="Weights: a safetensors file, a torch file, or a checkpoint.pt.")
    init_partial: bool = Field(False, description="Allow that tensors of init_from or of the adapter are left out.")


class LoraSettings(Section):
    """Low-rank adaptation of the LLM (Hu et al., 2021, arXiv 2106.09685)."""

    enabled: bool = Field(True, description="Off: the LLM stays exactly as it is.")
    rank: Count = Field(8, description="Rank r of the update.")
    alpha: Positive = Field(32, description="Scale: the update is multiplied by alpha / rank.")
    alpha_ratio: Positive | None = Field(None, description="alpha / rank, in place of alpha: the scale at any rank.")
    dropout: Fraction = Field(0.1, description="Dropout on the input of the update.")
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = Field(
        ["q_proj", "v_proj"], description="Names of the linear layers that get an update."
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) and value != "all-linear" else value

    rslora: bool = Field(False, description="Multiply by alpha / sqrt(rank) instead (arXiv 2312.03732).")
    dora: bool = Field(False, description="Learn magnitude and direction apart (arXiv 2402.09353).")


class LLMConfig(Section):
    """The language model that reads the dialogue."""

    path: str = Field("builtin:tiny-llama", description="Hugging Face id or folder, or builtin:tiny-llama.")
    dtype: Dtype = Field("float32", description="Of the frozen weights.")
    max_text_tokens: Count = Field(
        512, description="Text tokens of a prompt, at most; longer ones lose their oldest turns, which is counted."
    )
    gradient_checkpointing: bool = Field(False, description="Compute activations twice instead of keeping them.")


class PromptConfig(Section):
    """How a dialogue is written. `sweep inspect` shows the result."""

    format: Literal["plain", "chat"] = Field("plain", description="chat: in the tokenizer's own chat template.")
    instruction: str | None = Field(
        None, description="Stands before the dialogue. task: what the task says. Otherwise your own words; null: none."
    )
    roles: dict[str, str] = Field({}, description="Names for the roles of the corpus, e.g. {client: Patient}.")
    separator: str = Field("\n", description="After every turn, e.g. a line break or ' [SEP] '.")
    order: Literal["text-sound", "sound-text"] = Field(
        "text-sound", description="Of the heard turn's words and embeddings, where it is both read and heard."
    )

    @field_validator("separator", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        if isinstance(value, list):
            raise ValueError("brackets make a list in YAML; quote them, as in ' [SEP] '")
        return value

    history_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Tokens of the turns before the last one, at most; null: as many as fit."
    )


class ModelConfig(Section):
    """A speech LLM: encoder → adapter → LLM with LoRA."""

    modality: Literal["text", "speech", "text+speech"] = Field(
        "speech", description="How the last turn with sound is read; all other turns are text."
    )
    trainable: str = Field(
        "new",
        description="The parts that train, joined with +: encoder, adapter, lora, tokens (the learned vectors), llm, "
        "new (for adapter+lora+tokens), or patterns of parameter names such as encoder.*.layers.11.*; `sweep inspect` "
        "shows what they match.",
    )
    encoder: EncoderConfig = EncoderConfig()
    adapter: AdapterConfig = AdapterConfig()
    llm: LLMConfig = LLMConfig()
    lora: LoraSettings = LoraSettings()
    prompt: PromptConfig = PromptConfig()
    end_of_audio: Literal["none", "learned"] = Field(
        "none", description="A learned vector after the clip's embeddings."
    )
    cls: Literal["none", "before", "after"] = Field(
        "none", description="A learned [CLS] vector before the answer, or between the answer and EOS."
    )
    init_from: str | None = Field(
        None, description="A former trial (its folder, or a checkpoint.pt) whose trained tensors this one starts from."
    )
    init_partial: bool = Field(False, description="Allow that some tensors of init_from have no place in this model.")
    precision: Dtype = Field("float32", description="bfloat16: mixed precision (autocast), in training and scoring.")
    priors: Literal["as-is", "balanced"] = Field(
        "as-is", description="balanced: label scores are divided by the labels' shares in training."
    )
    max_new_tokens: Count = Field(64, description="Of a generated reply; longer ones are cut and counted as run-on.")

    @field_validator("trainable", mode="before")
    @classmethod
    def _join(cls, value: Any) -> Any:
        return "+".join(map(str, value)) if isinstance(value, list) else value

    @property
    def hears(self) -> bool:
        """Whether sound is part of the input."""
        return self.modality != "text"

    @property
    def patterns(self) -> list[str]:
        """The parts or patterns of `trainable`."""
        parts = [part.strip() for part in self.trainable.split("+") if part.strip()]
        return [name for part in parts for name in (NEW_PARTS if part == "new" else (part,))]

    @property
    def _may_train_encoder(self) -> bool:
        """Whether a pattern names it, or begins with a wildcard; what it matches is known with the model."""
        return any(pattern.startswith(("encoder", "*", "?", "[")) for pattern in self.patterns)

    def problems(self) -> list[str]:
        """Rules that span several settings, each as a line that names the key, the value, the rule and the fix."""
        found = []
        if self.adapter.stride > self.adapter.window:
            found.append(
                f"model.adapter.stride: {self.adapter.stride} is larger than model.adapter.window "
                f"({self.adapter.window}), so frames would be skipped; lower it"
            )
        if not self.patterns:
            found.append(f"model.trainable: {self.trainable!r} names no part; name one, e.g. adapter+lora")
        if "encoder" in self.patterns and self.encoder.dtype != "float32":
            found.append(
                f"model.encoder.dtype: {self.encoder.dtype} is for an encoder that stays frozen; set float32 and "
                "model.precision=bfloat16, or take the encoder out of model.trainable"
            )
        if self.encoder.spec_augment and not self._may_train_encoder:
            found.append(
                f"model.encoder.spec_augment: {self.encoder.spec_augment} has no effect on an encoder that stays "
                "frozen; set 0, or add encoder to model.trainable"
            )
        if self.encoder.dropout and not self._may_train_encoder:
            found.append(
                f"model.encoder.dropout: {self.encoder.dropout} has no effect on an encoder that stays frozen; set 0, "
                "or add encoder to model.trainable"
            )
        return found


class LossConfig(Section):
    """What is minimised at the positions that predict the answer. A weight of 0 costs nothing."""

    next_token: Weight = Field(1.0, description="Cross-entropy of the answer's tokens.")
    distillation: Weight = Field(
        0.0,
        description="Divergence from the same LLM reading the transcript (arXiv 2406.05968): over its 64 likeliest "
        "tokens, and all others as one.",
    )
    temperature: Positive = Field(1.0, description="Of the distillation; the loss is multiplied by its square.")
    hidden: Weight = Field(0.0, description="Mean squared distance of the last hidden states to that reader's.")


class LearningRates(Section):
    """Peaks for parts that shall differ from train.learning_rate."""

    encoder: Positive | None = None
    adapter: Positive | None = None
    lora: Positive | None = None
    tokens: Positive | None = None


class TrainConfig(Section):
    """How a trial is trained."""

    epochs: Count = Field(5, description="Passes over the training split; each ends with an evaluation and a report.")
    patience: Count | None = Field(
        None,
        description="End after so many epochs without a lower validation loss; null: never early. The weights and "
        "metrics of the last epoch count.",
    )
    batch_size: Count = Field(16, description="Items in an optimizer step, over all workers.")
    learning_rate: Positive = Field(1e-3, description="Peak of AdamW's learning rate.")
    learning_rates: LearningRates = LearningRates()
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="After the warm-up: down to zero, in a line or half a wave, or constant."
    )
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="AdamW's decoupled weight decay."
    )
    warmup: Fraction = Field(0.1, description="Share of the steps with a rising rate.")
    max_grad_norm: Positive = Field(1.0, description="Gradients are clipped to this norm.")
    losses: LossConfig = LossConfig()
    class_weights: Literal["equal", "balanced"] | ByLabel = Field(
        "equal",
        description="balanced: an item's loss counts with the inverse of its label's share in training, n / (K n_k). "
        "Or numbers, {task: {label: weight}}; what is not named counts 1.",
    )
    sampling: Literal["none", "balanced"] | ByLabel = Field(
        "none",
        description="balanced: items are drawn with replacement, as many an epoch as there are and labels of a task "
        "equally often, so an epoch is no longer every item once. Or numbers, as above, in proportion to which an item "
        "of the label is drawn.",
    )
    token_budget: Count = Field(
        16_384,
        description="Tokens and encoder frames computed at once (longest x count). Memory depends on it; the result "
        "does not, in fp32 and without dropout, whose draws follow the cut.",
    )
    checkpoint_steps: Count = Field(500, description="Optimizer steps between checkpoints within an epoch, at most.")
    checkpoint_seconds: Positive = Field(
        300, description="Seconds of training between checkpoints within an epoch, at most, up to the end of a step."
    )

    @property
    def teaches(self) -> bool:
        """Whether the base LLM has to read the transcript."""
        return self.losses.distillation + self.losses.hidden > 0

    def problems(self) -> list[str]:
        """As in ModelConfig."""
        losses, found = self.losses, []
        if losses.next_token + losses.distillation + losses.hidden == 0:
            found.append("train.losses: all weights are 0, so there is nothing to minimise; raise one")
        if self.sampling != "none" and self.class_weights != "equal":
            found.append(
                f"train.sampling: {_shown(self.sampling)} draws labels by weight, and train.class_weights "
                f"({_shown(self.class_weights)}) would count them by weight once more; set one of them to none or equal"
            )
        return found


def _shown(setting: str | ByLabel) -> str:
    return setting if isinstance(setting, str) else "numbers by label"

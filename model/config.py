"""Settings of the model and of its training."""

from typing import Annotated, Literal

from pydantic import Field

from data.config import Section

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class EncoderConfig(Section):
    """The speech encoder: HuBERT, wav2vec 2.0, WavLM or Whisper."""

    path: str = Field("builtin:tiny-whisper", description="Hugging Face id or folder, or builtin:tiny-whisper.")
    trainable: bool = Field(False, description="Train the encoder's transformer; its convolutions stay frozen.")


class AdapterConfig(Section):
    """Average pooling over encoder frames, then one linear layer to the LLM's width."""

    pool: Count = Field(8, description="Frames averaged to one embedding.")
    stride: Count = Field(4, description="Frames between two embeddings (50 frames/s / 4 = 12.5 embeddings/s).")
    trainable: bool = Field(True, description="Train the linear layer; a frozen one keeps its random weights.")


class LoraSettings(Section):
    """Low-rank adaptation of the LLM (Hu et al., 2021, arXiv 2106.09685)."""

    enabled: bool = Field(True, description="Off: the LLM stays exactly as it is.")
    rank: Count = Field(8, description="Rank r of the update.")
    alpha: Positive = Field(32, description="Scale: the update is multiplied by alpha / rank.")
    dropout: Fraction = Field(0.1, description="Dropout on the input of the update.")
    targets: list[str] | Literal["all-linear"] = Field(
        ["q_proj", "v_proj"], description="Names of the linear layers that get an update."
    )


class LLMConfig(Section):
    """The language model that reads the dialogue."""

    path: str = Field("builtin:tiny-llama", description="Hugging Face id or folder, or builtin:tiny-llama.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of the frozen weights.")
    max_text_tokens: Count = Field(512, description="Longer prompts lose their oldest turns, which is counted.")


class ModelConfig(Section):
    """A speech LLM: encoder → adapter → LLM with LoRA."""

    modality: Literal["text", "speech", "text+speech"] = Field(
        "speech", description="How the current utterance is read; the turns before it are always text."
    )
    encoder: EncoderConfig = EncoderConfig()
    adapter: AdapterConfig = AdapterConfig()
    llm: LLMConfig = LLMConfig()
    lora: LoraSettings = LoraSettings()
    end_of_audio: Literal["none", "learned"] = Field(
        "none", description="A learned vector after the clip's embeddings."
    )
    cls: Literal["none", "before", "after"] = Field(
        "none", description="A learned [CLS] vector before the label, or between the label and EOS."
    )

    @property
    def hears(self) -> bool:
        """Whether the utterance's sound is part of the input."""
        return self.modality != "text"

    def problems(self) -> list[str]:
        """Rules that span several settings, each as a line that names the key, the value, the rule and the fix."""
        found = []
        if self.adapter.stride > self.adapter.pool:
            found.append(
                f"model.adapter.stride: {self.adapter.stride} is larger than model.adapter.pool "
                f"({self.adapter.pool}), so frames would be skipped; lower it"
            )
        learned = self.cls != "none" or (self.hears and self.end_of_audio != "none")
        heard = self.hears and (self.encoder.trainable or self.adapter.trainable)
        if not (self.lora.enabled or learned or heard):
            found.append(
                "model.lora.enabled: false leaves nothing to train in this configuration; "
                "turn on LoRA, model.cls, or with speech the adapter or the encoder"
            )
        return found


class TrainConfig(Section):
    """How a trial is trained."""

    epochs: Count = Field(5, description="Passes over the training split; each ends with an evaluation and a report.")
    batch_size: Count = Field(16, description="Utterances in an optimizer step, over all workers.")
    learning_rate: Positive = Field(1e-3, description="Peak of AdamW's learning rate.")
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="AdamW's decoupled weight decay."
    )
    warmup: Fraction = Field(0.1, description="Share of the steps with a rising rate; afterwards it falls to zero.")
    max_grad_norm: Positive = Field(1.0, description="Gradients are clipped to this norm.")
    token_budget: Count = Field(
        16_384,
        description="Tokens and encoder frames computed at once (longest x count). Memory depends on it; the result "
        "does not, in fp32 and without dropout, whose draws follow the cut.",
    )
    checkpoint_steps: Count = Field(500, description="Optimizer steps between checkpoints within an epoch.")

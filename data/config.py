"""Settings of the data, and the base class of every section of the configuration tree."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Speed = Annotated[float, Field(ge=0.5, le=2, multiple_of=0.01)]
Decibel = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the configuration: immutable, unknown keys rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AugmentConfig(Section):
    """How clips of the training split are changed, anew in every epoch; validation and test hear them as they are.

    On an axis of a search, where a value is no list, numbers are written with commas: "0.9, 1.0, 1.1"; null is off.
    """

    speeds: tuple[Speed, ...] = Field(
        (),
        description="Factors of speed, tempo and pitch together, of which every clip draws one, e.g. [0.9, 1.0, 1.1] "
        "(Ko et al., 2015); empty: none. Batches are planned by the clips as they are, so slow ones take more memory.",
    )
    noise_db: tuple[Decibel, Decibel] | None = Field(
        None, description="[lowest, highest] signal-to-noise ratio (dB) of added white noise; null: none."
    )
    noise_probability: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="That a clip gets noise in an epoch, where noise_db is given."
    )

    @field_validator("speeds", "noise_db", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("speeds", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return () if value is None else value

    @field_validator("noise_db")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError("the lowest ratio comes first")
        return value


class DataConfig(Section):
    """Which corpus is read, and how."""

    shards: str = Field("builtin:synthetic", description="Folder made by `sweep prepare`, or builtin:synthetic.")
    fold: Annotated[int, Field(ge=0)] = Field(
        0, description="Which fold is for test, of a corpus that was prepared with split.folds; the next is for val."
    )
    history: Annotated[int, Field(ge=0)] = Field(
        10, description="Turns of dialogue before the last one, at most, or back to the one heard."
    )
    reader: Literal["ray", "local", "auto"] = Field(
        "ray",
        description="ray: Ray Data, any number of nodes. local: memory-mapped, for shards on the node's own disk. "
        "auto: local where the folder can be seen, else ray.",
    )
    sound: Literal["recorded", "zeroed", "shuffled", "noisy"] = Field(
        "recorded",
        description="Control of a claim about speech: what is heard in place of a clip. zeroed: silence of its length. "
        "shuffled: another utterance of the same role and split. noisy: white noise added at data.snr_db.",
    )
    snr_db: Annotated[float, Field(allow_inf_nan=False)] = Field(
        0.0, description="Signal-to-noise ratio (dB) of noisy sound."
    )
    last_text: Literal["given", "omitted"] = Field(
        "given", description="Control: omitted leaves out the words of the turn that is heard, or else of the last one."
    )
    augment: AugmentConfig = AugmentConfig()


class TaskWeights(Section):
    """What is learnt: the weight of each task's mean loss per token. 0 leaves a task out, at no cost.

    Tasks with a weight are trained together in one model; the first of them is the one that metrics without a prefix
    speak of.
    """

    classify: Weight = Field(1.0, description="The code of the current utterance.")
    client_talk: Weight = Field(0.0, description="The code of the current utterance, client turns alone.")
    therapist_behaviour: Weight = Field(0.0, description="The code of the current utterance, therapist turns alone.")
    forecast: Weight = Field(0.0, description="The code of the next utterance, which is neither read nor heard.")
    response: Weight = Field(0.0, description="The therapist's reply, as text.")
    quality: Weight = Field(0.0, description="The quality of the whole session.")

    def active(self) -> list[str]:
        """The tasks with a weight, in the order of their declaration."""
        return [name for name in type(self).model_fields if getattr(self, name) > 0]

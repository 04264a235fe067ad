"""Settings of data loading and of the tasks, and the base class of every section of the configuration."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Speed = Annotated[float, Field(ge=0.5, le=2, multiple_of=0.01)]
Decibel = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    """A section of the configuration. It is immutable and rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AugmentConfig(Section):
    """Augmentation of training clips, drawn again in every epoch. Validation and test clips are never changed.

    As a value of a search axis, a list is written as text with commas: "0.9, 1.0, 1.1"; null turns it off.
    """

    speeds: tuple[Speed, ...] = Field(
        (),
        description="Speed factors, of which every clip draws one, e.g. [0.9, 1.0, 1.1]; they change tempo and pitch "
        "(Ko et al., 2015). Empty: off. Batches are planned with the original lengths, so slow clips take more memory.",
    )
    noise_db: tuple[Decibel, Decibel] | None = Field(
        None, description="[lowest, highest] signal-to-noise ratio (dB) of added white noise; null: off."
    )
    noise_probability: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Probability that a clip gets noise in an epoch, if noise_db is set."
    )

    @field_validator("speeds", "noise_db", mode="before")
    @classmethod
    def _split_text(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("speeds", mode="before")
    @classmethod
    def _null_is_off(cls, value: object) -> object:
        return () if value is None else value

    @field_validator("noise_db")
    @classmethod
    def _check_order(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError("the lowest ratio must come first")
        return value


class DataConfig(Section):
    """Which corpus is used and how its examples are built."""

    shards: str = Field(
        "builtin:synthetic", description="Folder or URL written by `sweep prepare`, or builtin:synthetic."
    )
    fold: Annotated[int, Field(ge=0)] = Field(
        0, description="Test fold of a corpus that was prepared with split.folds; the next fold is for validation."
    )
    codes: str | None = Field(
        None,
        description="Level of the corpus's codebook whose classes are predicted, e.g. annomi; names: each code under "
        "its name; null: the codes as the corpus stores them. Another level needs no other preparation.",
    )
    history: Annotated[int, Field(ge=0)] = Field(
        10, description="Maximum number of turns before the last one; more if the audio turn is further back."
    )
    reader: Literal["ray", "local", "auto"] = Field(
        "ray",
        description="ray: Ray Data, for any number of nodes. local: memory-mapped shards on the disk of the node. "
        "auto: local if the folder is visible on the node, else ray.",
    )
    sound: Literal["recorded", "zeroed", "shuffled", "noisy"] = Field(
        "recorded",
        description="Control experiment for a claim about speech. recorded: the clip. zeroed: silence of the same "
        "length. shuffled: another utterance of the same role and split. noisy: with white noise at data.snr_db.",
    )
    snr_db: Annotated[float, Field(allow_inf_nan=False)] = Field(
        0.0, description="Signal-to-noise ratio (dB) if data.sound is noisy."
    )
    last_text: Literal["given", "omitted"] = Field(
        "given", description="Control experiment: omitted removes the text of the audio turn, or of the last turn."
    )
    augment: AugmentConfig = AugmentConfig()


class TaskWeights(Section):
    """Weight of the mean loss per token of each task. A task with weight 0 is not trained and costs nothing.

    All tasks with a weight are trained together in one model. Metrics without a prefix belong to the first of them.
    """

    classify: Weight = Field(1.0, description="Predict the code of the current utterance.")
    client_talk: Weight = Field(0.0, description="Predict the code of client turns only.")
    therapist_behaviour: Weight = Field(0.0, description="Predict the code of therapist turns only.")
    forecast: Weight = Field(0.0, description="Predict the code of the next utterance from the turns before it.")
    response: Weight = Field(0.0, description="Write the reply of the therapist.")
    quality: Weight = Field(0.0, description="Predict the quality of the whole session.")

    def active(self) -> list[str]:
        """Return the names of the tasks with a weight, in the order of their declaration."""
        return [name for name in type(self).model_fields if getattr(self, name) > 0]

"""Settings of the data, and the base class of every section of the configuration tree."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the configuration: immutable, unknown keys rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """Which corpus is read, and how."""

    shards: str = Field("builtin:synthetic", description="Folder made by `sweep prepare`, or builtin:synthetic.")
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

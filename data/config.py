"""Settings of the data, and the base class of every section of the configuration tree."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A part of the configuration: immutable, unknown keys rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """Which corpus is read, and how."""

    shards: str = Field("builtin:synthetic", description="Folder made by `sweep prepare`, or builtin:synthetic.")
    history: Annotated[int, Field(ge=0)] = Field(10, description="Turns of dialogue before the utterance, at most.")
    reader: Literal["ray", "local", "auto"] = Field(
        "ray",
        description="ray: Ray Data, any number of nodes. local: memory-mapped, for shards on the node's own disk. "
        "auto: local where the folder can be seen, else ray.",
    )

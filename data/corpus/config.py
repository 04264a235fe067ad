"""Settings of `sweep prepare`: how a corpus is read, checked, split and stored."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from data.config import Section

Criterion = Literal["video", "conversation", "speaker"]


class SplitConfig(Section):
    """How sessions are dealt to train, val and test."""

    by: tuple[Criterion, ...] = Field(
        ("video",),
        description="What must not be cut, besides a conversation: all sessions of a video, or all of a speaker.",
    )
    stratify: tuple[Literal["quality", "label"], ...] = Field(
        ("quality", "label"), description="Whose shares the splits have in common, as far as whole groups allow."
    )
    fractions: tuple[float, float, float] = Field(
        (0.7, 0.15, 0.15), description="Shares of train, val and test, of the labelled turns."
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Of the order in which groups are dealt.")
    folds: Annotated[int, Field(ge=3)] | None = Field(
        None, description="k-fold: data.fold chooses the one for test, the next is for val, the others for train."
    )
    file: str | None = Field(
        None, description="CSV with the columns conversation and split (train, val, test): a fixed list."
    )

    @field_validator("by", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        names = (value,) if isinstance(value, str) else value
        for name in names if isinstance(names, list | tuple) else ():
            if name in ("row", "turn", "utterance", "random"):
                raise ValueError(
                    f"a split by {name} puts turns of one conversation, one voice and one room into training and test, "
                    "so the test would measure memory; use video, conversation or speaker"
                )
        return names

    @field_validator("fractions")
    @classmethod
    def _sum(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(value) <= 0 or abs(sum(value) - 1) > 1e-6:
            raise ValueError("must be three positive shares that sum to 1, e.g. [0.7, 0.15, 0.15]")
        return value


class ColumnConfig(Section):
    """`sweep prepare table`: which column of the file holds what; null: the file does not have it."""

    conversation: str = Field("conversation", description="Session that the turn belongs to.")
    text: str | None = Field("text", description="What was said.")
    speaker: str = Field("speaker", description="Who spoke; roles maps it to a role.")
    id: str | None = Field(None, description="Of the utterance, unique in its conversation; else its place is used.")
    index: str | None = Field(None, description="Place in the conversation; else the order of the rows.")
    label: str | None = Field(None, description="Code of the turn; empty: context only.")
    annotator: str | None = Field(
        None, description="Who gave the label; rows of one utterance by several annotators are put to the vote."
    )
    start: str | None = Field(
        None,
        description="Start in the recording: seconds or [HH:]MM:SS. null: with --audio, and without `clip`, a usual "
        "name (start, t_start, start_time, onset, begin, from), and the like of it for the end.",
    )
    end: str | None = Field(None, description="End in the recording; else the start of the next turn.")
    video: str | None = Field(None, description="What several sessions may share, e.g. a video; never cut by a split.")
    person: str | None = Field(None, description="Identity of the client, for split.by speaker.")
    quality: str | None = Field(None, description="Label of the whole session.")
    split: str | None = Field(None, description="train, val or test: a split that the corpus comes with.")
    recording: str | None = Field(
        None, description="Audio file of the session, relative to --audio; else <conversation>.wav, .flac …"
    )
    clip: str | None = Field(None, description="Audio file of the turn alone, relative to --audio.")


class AlignConfig(Section):
    """Forced alignment of the turns' times (`--align`)."""

    model: str | None = Field(None, description="CTC model by Hugging Face id or folder; null: times stay as given.")
    window: Annotated[float, Field(gt=0)] = Field(2.0, description="s around the given times that are searched.")
    min_confidence: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="Mean probability of the aligned characters under which the given times stay."
    )


class CorpusConfig(Section, coerce_numbers_to_str=True):
    """Everything that decides what is made of a corpus."""

    roles: dict[str, str] = Field(
        {},
        description="Speaker as written in the source → role, e.g. {SPEAKER_00: therapist}; for one session alone, "
        "with its name: {12/SPEAKER_00: client}.",
    )
    labels: dict[str, tuple[str, ...]] = Field(
        {}, description="Role → labels it may carry, in order; empty: the format's own, or all that occur."
    )
    qualities: tuple[str, ...] = Field((), description="Qualities of sessions, in order; empty: all that occur.")
    coded: bool = Field(True, description="false: a format's columns of codes may be missing.")
    label_separator: str | None = Field(None, description="Between the labels of a turn that has several, e.g. ';'.")
    columns: ColumnConfig = ColumnConfig()
    time_unit: Literal["s", "ms"] = Field("s", description="Of times that are plain numbers.")
    encoding: str = Field("utf-8", description="Of text files, e.g. cp1252; never guessed.")
    channels: dict[str, Annotated[int, Field(ge=0)]] = Field(
        {}, description="Role → channel of the recording that holds this speaker alone; empty: mixed down."
    )
    codec: Literal["pcm16", "flac"] = Field(
        "pcm16", description="pcm16 reads 30 times faster, flac is smaller: for object stores."
    )
    max_rejected: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="Share of rejected rows above which the build fails."
    )
    sessions: Annotated[int, Field(ge=3)] = Field(48, description="Dialogues of the synthetic corpus.")
    split: SplitConfig = SplitConfig()
    align: AlignConfig = AlignConfig()

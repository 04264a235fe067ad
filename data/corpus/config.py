"""Settings of `sweep prepare`: how a corpus is imported, checked, split and stored."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from data.config import Section
from data.corpus.codebook import Codebook

Criterion = Literal["video", "conversation", "speaker"]


class SplitConfig(Section):
    """How sessions are assigned to train, val and test."""

    by: tuple[Criterion, ...] = Field(
        ("video",),
        description="What stays in one split: all sessions of a video, or all sessions of a speaker.",
    )
    stratify: tuple[Literal["quality", "label"], ...] = Field(
        ("quality", "label"), description="Distributions that all splits share, as far as whole groups allow."
    )
    fractions: tuple[float, float, float] = Field(
        (0.7, 0.15, 0.15), description="Fractions of the labelled turns in train, val and test."
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Seed of the order in which groups are assigned.")
    folds: Annotated[int, Field(ge=3)] | None = Field(
        None, description="Number of folds: data.fold is the test fold, the next one is val, the others are train."
    )
    file: str | None = Field(
        None, description="CSV with the columns conversation and split (train, val, test): a fixed split."
    )

    @field_validator("by", mode="before")
    @classmethod
    def _refuse_turns(cls, value: object) -> object:
        names = (value,) if isinstance(value, str) else value
        for name in names if isinstance(names, list | tuple) else ():
            if name in ("row", "turn", "utterance", "random"):
                raise ValueError(
                    f"a split by {name} puts turns of one conversation, voice and room into training and test, so the "
                    "test would measure memorisation; use video, conversation or speaker"
                )
        return names

    @field_validator("fractions")
    @classmethod
    def _check_sum(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(value) <= 0 or abs(sum(value) - 1) > 1e-6:
            raise ValueError("must be three positive fractions that sum to 1, e.g. [0.7, 0.15, 0.15]")
        return value


class ColumnConfig(Section):
    """Column names for `sweep prepare table`; null: the file has no such column."""

    conversation: str | None = Field(
        "conversation", description="Session of the turn; null: every file is a session, named like the file."
    )
    text: str | None = Field("text", description="Transcript of the turn.")
    speaker: str = Field("speaker", description="Speaker of the turn; `roles` maps it to a role.")
    id: str | None = Field(None, description="Utterance id, unique in its conversation; null: the position is used.")
    index: str | None = Field(None, description="Position in the conversation; null: the order of the rows.")
    label: str | None = Field(None, description="Code of the turn; an empty cell: context only.")
    annotator: str | None = Field(
        None, description="Annotator of the label; several annotators of one utterance are resolved by majority vote."
    )
    start: str | None = Field(
        None,
        description="Start in the recording: seconds or [HH:]MM:SS. null: with --audio and without `clip`, one of the "
        "usual names is used (start, t_start, start_time, onset, begin, from), and likewise for the end.",
    )
    end: str | None = Field(None, description="End in the recording; null: the start of the next turn.")
    video: str | None = Field(None, description="Video of the session; sessions of one video stay in one split.")
    person: str | None = Field(None, description="Identity of the client, for split.by=speaker.")
    quality: str | None = Field(None, description="Quality label of the whole session.")
    split: str | None = Field(None, description="Predefined split of the session: train, val or test.")
    recording: str | None = Field(
        None, description="Audio file of the session, relative to --audio; null: <conversation>.wav, .flac …"
    )
    clip: str | None = Field(None, description="Audio file of the single turn, relative to --audio.")


class TierConfig(Section):
    """Tiers of ELAN, Praat and CHAT."""

    text: tuple[str, ...] = Field(
        (),
        description="Tiers with what is said, e.g. '{speaker} text'; empty: all that depend on no other tier and have "
        "no codes.",
    )
    code: str | None = Field(
        None,
        description="Name of the tier with the codes of a tier, e.g. '{tier} code' or '{speaker} code'; null: tiers "
        "whose names have the word code, label, behaviour, misc or miti, or that have a controlled vocabulary.",
    )


class AlignConfig(Section):
    """Forced alignment of the times of the turns (`--align`)."""

    model: str | None = Field(None, description="CTC model, a Hugging Face id or folder; null: times are not aligned.")
    window: Annotated[float, Field(gt=0)] = Field(2.0, description="Seconds around the given times that are searched.")
    min_confidence: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="Minimum mean probability of the aligned characters; below it the given times are kept."
    )


class CorpusConfig(Section, coerce_numbers_to_str=True):
    """All settings that determine the content of a prepared corpus."""

    roles: dict[str, str] = Field(
        {},
        description="Speaker as written in the source → role, e.g. {SPEAKER_00: therapist}; for a single session "
        "with the session id: {12/SPEAKER_00: client}.",
    )
    labels: dict[str, tuple[str, ...]] = Field(
        {}, description="Role → labels it may have, in order; empty: those of the format, or all that occur."
    )
    codebook: Codebook | None = Field(
        None,
        description="Name of a shipped codebook (`sweep codebooks` lists them), a YAML file or its content: names, "
        "spellings and merges of the codes, in place of `labels`.",
    )
    license: str | None = Field(
        None, description="Licence of the corpus for its card, an identifier of Hugging Face such as cc-by-4.0."
    )
    qualities: tuple[str, ...] = Field((), description="Quality labels of sessions, in order; empty: all that occur.")
    coded: bool = Field(True, description="false: the columns with codes may be missing.")
    label_separator: str | None = Field(None, description="Separator of several labels of one turn, e.g. ';'.")
    columns: ColumnConfig = ColumnConfig()
    tiers: TierConfig = TierConfig()
    time_unit: Literal["s", "ms", "d"] = Field(
        "s", description="Unit of times that are plain numbers; d: fractions of a day, as Excel stores times."
    )
    annotations: Literal["drop", "keep"] = Field(
        "drop",
        description="Annotations in brackets ([laughter], <sync>) in transcripts: leave them out of the text, or keep "
        "them. Tables keep theirs.",
    )
    line_codes: Literal["()", "[]"] | None = Field(
        None, description="Brackets around the codes at the end of a turn in typed transcripts; null: they are text."
    )
    encoding: str = Field(
        "utf-8", description="Encoding of text files, e.g. cp1252; only a byte order mark overrides it."
    )
    recordings: Literal["auto", "session", "speaker"] = Field(
        "auto",
        description="Whether there is a recording a session, or one for each of its speakers, as Zoom writes them; "
        "auto: those of the speakers where the session has none.",
    )
    channels: dict[str, Annotated[int, Field(ge=0)]] = Field(
        {}, description="Role → channel of the recording with only this speaker; empty: channels are mixed down."
    )
    codec: Literal["pcm16", "flac"] = Field(
        "pcm16", description="pcm16 is read 30 times faster; flac is smaller and suits object stores."
    )
    max_rejected: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="Maximum fraction of rejected rows; with more the preparation fails."
    )
    sessions: Annotated[int, Field(ge=3)] = Field(48, description="Number of sessions of the synthetic corpus.")
    split: SplitConfig = SplitConfig()
    align: AlignConfig = AlignConfig()

    @model_validator(mode="after")
    def _check_codebook(self) -> "CorpusConfig":
        if self.codebook is None:
            return self
        if self.labels:
            raise ValueError("labels: the codebook declares them; remove labels, or codebook")
        if problems := self.codebook.problems():
            raise ValueError(f"codebook: {'; '.join(problems)}")
        return self

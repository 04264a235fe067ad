"""Summaries of splits and findings of a prepared corpus, for the terminal and the report."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from data.corpus.issues import Finding
from data.errors import DataError
from data.shards.dataset import AGAIN, FINDINGS, Shards

Rows = tuple[list[str], list[list[str]]]  # header and rows


@dataclass(frozen=True, slots=True)
class SplitSummary:
    """The content of a split or fold."""

    name: str  # "train" or "fold 0"
    sessions: int
    groups: int  # see `data.preparation.split.groups`
    turns: int
    with_audio: int  # turns
    hours: float
    labelled: int  # turns
    labels: dict[str, int]  # label → turns
    qualities: dict[str, int]  # quality → sessions


def split_names(shards: Shards) -> list[str]:
    """Return, for each row, the name of its split, or of its fold if the corpus has folds."""
    if shards.manifest.config.split.folds is None:
        return list(shards.columns["split"])
    return [f"fold {fold}" for fold in shards.columns["fold"]]


def split_summaries(shards: Shards) -> list[SplitSummary]:
    """Return a summary of every split or fold, and their sum as the last one."""
    manifest, columns = shards.manifest, shards.columns
    groups: dict[str, set[str]] = defaultdict(set)
    with_audio, labelled = Counter[str](), Counter[str]()
    qualities: dict[str, dict[str, str]] = defaultdict(dict)
    names = ("conversation", "group", "n_samples", "label", "quality")
    for part, conversation, group, samples, label, quality in zip(
        split_names(shards), *(columns[name] for name in names), strict=True
    ):
        groups[part].add(group)
        with_audio[part] += samples > 0
        labelled[part] += label is not None
        if quality is not None:
            qualities[part][conversation] = quality
    summaries = []
    for key in manifest.sessions:
        name = key if manifest.config.split.folds is None else f"fold {key}"
        rated = Counter(qualities[name].values())
        summaries.append(
            SplitSummary(
                name=name,
                sessions=manifest.sessions[key],
                groups=len(groups[name]),
                turns=manifest.turns[key],
                with_audio=with_audio[name],
                hours=manifest.hours[key],
                labelled=labelled[name],
                labels=manifest.label_counts[key],
                qualities={quality: rated[quality] for quality in manifest.qualities},
            )
        )
    return [*summaries, _sum(summaries)]


def _sum(summaries: Sequence[SplitSummary]) -> SplitSummary:
    def total(counts: Sequence[dict[str, int]]) -> dict[str, int]:
        return {name: sum(count[name] for count in counts) for name in counts[0]}

    return SplitSummary(
        name="all",
        sessions=sum(part.sessions for part in summaries),
        groups=sum(part.groups for part in summaries),  # no group is in two splits
        turns=sum(part.turns for part in summaries),
        with_audio=sum(part.with_audio for part in summaries),
        hours=sum(part.hours for part in summaries),
        labelled=sum(part.labelled for part in summaries),
        labels=total([part.labels for part in summaries]),
        qualities=total([part.qualities for part in summaries]),
    )


def split_rows(shards: Shards) -> Rows:
    """Return a table of splits or folds with their sum in the last row and a column for every label."""
    header = ["split", "sessions", "turns", "with audio", "hours", *shards.manifest.labels]
    rows = [
        [part.name, str(part.sessions), str(part.turns), str(part.with_audio), f"{part.hours:.2f}"]
        + [str(part.labels[label]) for label in shards.manifest.labels]
        for part in split_summaries(shards)
    ]
    return header, rows


def by_code(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """Group findings by code; codes are sorted, so that rejected turns come first."""
    grouped: dict[str, list[Finding]] = {code: [] for code in sorted({finding.code for finding in findings})}
    for finding in findings:
        grouped[finding.code].append(finding)
    return grouped


def finding_rows(findings: Sequence[Finding]) -> Rows:
    """Return a table of codes with the number of findings and the first one as an example."""
    rows = [
        [code, str(len(group)), group[0].consequence, f"{group[0].where}, {group[0].utterance}: {group[0].message}"]
        for code, group in by_code(findings).items()
    ]
    return ["code", "count", "consequence", "example"], rows


def read_findings(shards: Shards) -> list[Finding]:
    """Return all findings of the preparation.

    Raises:
        DataError: findings.jsonl is missing or damaged.
    """
    name = shards.store / FINDINGS
    try:
        lines = shards.store.read(FINDINGS).decode().splitlines()
        return [Finding.from_dict(json.loads(line)) for line in lines]
    except FileNotFoundError:
        raise DataError(f"{name}: the file is missing; {AGAIN}") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{name}: not a list of findings; {AGAIN}") from None

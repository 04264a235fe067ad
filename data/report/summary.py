"""A prepared corpus in a few rows: what its splits hold and what was found, for the terminal and the report."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from data.corpus.issues import Finding
from data.errors import DataError
from data.shards.dataset import FINDINGS, Shards

Rows = tuple[list[str], list[list[str]]]  # header, and as many cells a row


@dataclass(frozen=True, slots=True)
class Part:
    """What a split, or a fold, holds."""

    name: str  # "train" or "fold 0"
    sessions: int
    groups: int  # of sessions that the split keeps together
    turns: int
    heard: int  # turns with sound
    hours: float
    labelled: int  # turns
    labels: dict[str, int]  # label → turns
    qualities: dict[str, int]  # quality → sessions


def part_names(shards: Shards) -> list[str]:
    """By row: the name of its split, or of its fold where the corpus has folds."""
    if shards.manifest.config.split.folds is None:
        return list(shards.columns["split"])
    return [f"fold {fold}" for fold in shards.columns["fold"]]


def parts(shards: Shards) -> list[Part]:
    """Every split or fold, and their sum as the last one."""
    manifest, columns = shards.manifest, shards.columns
    groups: dict[str, set[str]] = defaultdict(set)
    heard, labelled = Counter[str](), Counter[str]()
    qualities: dict[str, dict[str, str]] = defaultdict(dict)
    names = ("conversation", "group", "n_samples", "label", "quality")
    for part, conversation, group, samples, label, quality in zip(
        part_names(shards), *(columns[name] for name in names), strict=True
    ):
        groups[part].add(group)
        heard[part] += samples > 0
        labelled[part] += label is not None
        if quality is not None:
            qualities[part][conversation] = quality
    found = []
    for key in manifest.sessions:
        name = key if manifest.config.split.folds is None else f"fold {key}"
        rated = Counter(qualities[name].values())
        found.append(
            Part(
                name=name,
                sessions=manifest.sessions[key],
                groups=len(groups[name]),
                turns=manifest.turns[key],
                heard=heard[name],
                hours=manifest.hours[key],
                labelled=labelled[name],
                labels=manifest.label_counts[key],
                qualities={quality: rated[quality] for quality in manifest.qualities},
            )
        )
    return [*found, _sum(found)]


def _sum(found: Sequence[Part]) -> Part:
    def total(counts: Sequence[dict[str, int]]) -> dict[str, int]:
        return {name: sum(own[name] for own in counts) for name in counts[0]}

    return Part(
        name="all",
        sessions=sum(part.sessions for part in found),
        groups=sum(part.groups for part in found),  # no group stands in two parts
        turns=sum(part.turns for part in found),
        heard=sum(part.heard for part in found),
        hours=sum(part.hours for part in found),
        labelled=sum(part.labelled for part in found),
        labels=total([part.labels for part in found]),
        qualities=total([part.qualities for part in found]),
    )


def split_rows(shards: Shards) -> Rows:
    """What the splits or folds hold, and their sum in the last row; a column a label."""
    header = ["split", "sessions", "turns", "with sound", "hours", *shards.manifest.labels]
    rows = [
        [part.name, str(part.sessions), str(part.turns), str(part.heard), f"{part.hours:.2f}"]
        + [str(part.labels[label]) for label in shards.manifest.labels]
        for part in parts(shards)
    ]
    return header, rows


def by_code(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """Findings in their order, by code; the codes in theirs: rejected, failed, kept."""
    found: dict[str, list[Finding]] = {code: [] for code in sorted({finding.code for finding in findings})}
    for finding in findings:
        found[finding.code].append(finding)
    return found


def finding_rows(findings: Sequence[Finding]) -> Rows:
    """A row for every code that occurs, with its first finding as the example."""
    rows = [
        [code, str(len(own)), own[0].done, f"{own[0].where}, {own[0].utterance}: {own[0].message}"]
        for code, own in by_code(findings).items()
    ]
    return ["code", "count", "what was done", "for example"], rows


def read_findings(shards: Shards) -> list[Finding]:
    """Every finding of the preparation.

    Raises:
        DataError: the list is missing or damaged.
    """
    name, again = shards.store / FINDINGS, "prepare the corpus again"
    try:
        lines = shards.store.read(FINDINGS).decode().splitlines()
        return [Finding.from_dict(json.loads(line)) for line in lines]
    except FileNotFoundError:
        raise DataError(f"{name}: the file is missing; {again}") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{name}: not a list of findings; {again}") from None

"""The columns of a prepared corpus, and values that several sections of the report derive from them."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from data.corpus.schema import SAMPLE_RATE, is_rejected
from data.report import charts
from data.report.summary import split_names
from data.shards.dataset import Shards


class CorpusColumns:
    """The columns of a corpus and derived values, one per row or session."""

    def __init__(self, shards: Shards) -> None:
        self.shards, self.columns = shards, shards.columns
        self.splits = split_names(shards)
        self.roles = charts.colours_of(sorted(set(self.columns["speaker"])), charts.ROLE_COLOURS)
        self.labels = charts.colours_of(shards.manifest.labels)
        self.flags = [flags.split() for flags in self.columns["flags"]]
        self.sessions: dict[str, list[int]] = defaultdict(list)
        for row, name in enumerate(self.columns["conversation"]):
            self.sessions[name].append(row)
        spans = zip(self.columns["t_start"], self.columns["t_end"], strict=True)
        # The times of a rejected turn may be wrong, so the length of its clip counts.
        self.seconds = [
            max(0.0, end - start) if None not in (start, end) and not is_rejected(flags) else samples / SAMPLE_RATE
            for (start, end), flags, samples in zip(spans, self.flags, self.columns["n_samples"], strict=True)
        ]
        self.timed = any(start is not None for start in self.columns["t_start"])
        self.word_counts = [len(text.split()) for text in self.columns["text"]]

    def random_key(self, name: str) -> str:
        """Return a pseudo-random sort key that depends only on the content of the corpus and the name."""
        return hashlib.sha256(f"{self.shards.manifest.fingerprint} {name}".encode()).hexdigest()

    def by_role(self, values: Sequence[float | None]) -> list[tuple[str, list[float]]]:
        """Return colour and values of each role from one value per row; None is left out."""
        values_of: dict[str, list[float]] = {role: [] for role in self.roles}
        for role, value in zip(self.columns["speaker"], values, strict=True):
            if value is not None:
                values_of[role].append(value)
        return [(self.roles[role], kept) for role, kept in values_of.items()]

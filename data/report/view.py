"""A prepared corpus by columns, with what several sections of the report read from them."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from data.corpus.schema import SAMPLE_RATE, is_rejected
from data.report import pictures
from data.report.summary import part_names
from data.shards.dataset import Shards


class View:
    """The columns of a corpus, and what several sections read from them."""

    def __init__(self, shards: Shards) -> None:
        self.shards, self.columns = shards, shards.columns
        self.parts = part_names(shards)
        self.roles = pictures.coloured(sorted(set(self.columns["speaker"])), pictures.ROLE_COLOURS)
        self.labels = pictures.coloured(shards.manifest.labels)
        self.flags = [flags.split() for flags in self.columns["flags"]]
        self.sessions: dict[str, list[int]] = defaultdict(list)
        for row, name in enumerate(self.columns["conversation"]):
            self.sessions[name].append(row)
        spans = zip(self.columns["t_start"], self.columns["t_end"], strict=True)
        # The times of a rejected turn may be wrong.
        self.seconds = [
            max(0.0, end - start) if None not in (start, end) and not is_rejected(flags) else samples / SAMPLE_RATE
            for (start, end), flags, samples in zip(spans, self.flags, self.columns["n_samples"], strict=True)
        ]
        self.timed = any(start is not None for start in self.columns["t_start"])
        self.words = [len(text.split()) for text in self.columns["text"]]

    def drawn(self, name: str) -> str:
        """A key that sorts by chance, and the same whenever the content is the same."""
        return hashlib.sha256(f"{self.shards.manifest.fingerprint} {name}".encode()).hexdigest()

    def by_role(self, values: Sequence[float | None]) -> list[tuple[str, list[float]]]:
        """Colour and values of each role, from one value a row; None is left out."""
        found: dict[str, list[float]] = {role: [] for role in self.roles}
        for role, value in zip(self.columns["speaker"], values, strict=True):
            if value is not None:
                found[role].append(value)
        return [(self.roles[role], own) for role, own in found.items()]

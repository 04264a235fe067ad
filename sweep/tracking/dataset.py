"""The corpus of a sweep as MLflow shows it: tags to filter by, and a dataset that runs are linked to."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pyarrow as pa

from data.corpus.schema import TURN_SCHEMA
from data.shards.dataset import Shards

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

DIGEST = 36  # characters that MLflow allows


@dataclass(frozen=True)
class Corpus:
    """What names a corpus, and what is in it."""

    name: str
    fingerprint: str
    labels: tuple[str, ...]
    place: str  # of its shards
    counts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # sessions, turns, hours: by split or fold
    fold: int | None = None  # the one for test, where there are folds

    @classmethod
    def of(cls, shards: Shards) -> "Corpus":
        """That of some shards; nothing but their manifest is read."""
        known = shards.manifest
        return cls(
            name=known.corpus,
            fingerprint=shards.fingerprint,
            labels=known.labels,
            place=without_secrets(str(shards.folder)),
            counts={"sessions": known.sessions, "turns": known.turns, "hours": known.hours},
            fold=shards.fold if known.config.split.folds else None,
        )

    def with_fold(self, fold: int) -> "Corpus":
        """The same with another fold for test; see `Shards.fingerprint`."""
        return replace(self, fold=fold, fingerprint=f"{self.fingerprint.rpartition('-')[0]}-{fold}")

    def tags(self) -> dict[str, str]:
        """For a run."""
        told = {"corpus": self.name, "fingerprint": self.fingerprint, "labels": ",".join(self.labels)}
        return {f"data.{name}": value for name, value in told.items()}

    def input(self) -> "DatasetInput":
        """For `MlflowClient.log_inputs`."""
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

        columns = [{"name": column.name, "type": _type(column.type)} for column in TURN_SCHEMA]
        profile = {"labels": self.labels, **self.counts} | ({} if self.fold is None else {"fold": self.fold})
        dataset = Dataset(
            name=self.name,
            digest=self.fingerprint[:DIGEST],
            source_type=urlsplit(self.place).scheme or "local",
            source=json.dumps({"uri": self.place}),
            schema=json.dumps({"mlflow_colspec": columns}),
            profile=json.dumps(profile),
        )
        return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, "training")])


def _type(stored: pa.DataType) -> str:
    """What a column holds, however it is stored."""
    held = stored.value_type if pa.types.is_dictionary(stored) else stored
    return str(held).removeprefix("large_")


def without_secrets(place: str) -> str:
    """A folder as it is; a URL without its user, its password and its options, of which some are keys."""
    if "://" not in place:
        return place
    url = urlsplit(place)
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"

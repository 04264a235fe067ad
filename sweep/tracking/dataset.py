"""The corpus of a sweep in MLflow: tags to filter by, and a dataset that runs are linked to."""

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

DIGEST = 36  # characters that MLflow allows for a dataset's digest


@dataclass(frozen=True)
class Corpus:
    """A corpus: its identity and its content."""

    name: str
    fingerprint: str
    labels: tuple[str, ...]
    address: str  # path or URL of its shards, without secrets
    counts: Mapping[str, Mapping[str, float]] = field(
        default_factory=dict
    )  # of sessions, turns and hours, by split or fold
    fold: int | None = None  # for test, where there are folds

    @classmethod
    def of(cls, shards: Shards) -> "Corpus":
        """Return the corpus of some shards; only their manifest is read."""
        manifest = shards.manifest
        return cls(
            name=manifest.corpus,
            fingerprint=shards.fingerprint,
            labels=manifest.labels,
            address=without_secrets(str(shards.folder)),
            counts={"sessions": manifest.sessions, "turns": manifest.turns, "hours": manifest.hours},
            fold=shards.fold if manifest.config.split.folds else None,
        )

    def with_fold(self, fold: int) -> "Corpus":
        """Return the corpus with another fold for test; see `Shards.fingerprint`."""
        return replace(self, fold=fold, fingerprint=f"{self.fingerprint.rpartition('-')[0]}-{fold}")

    def tags(self) -> dict[str, str]:
        """Return the tags of a run on this corpus."""
        labels = ",".join(self.labels)
        return {"data.corpus": self.name, "data.fingerprint": self.fingerprint, "data.labels": labels}

    def input(self) -> "DatasetInput":
        """Return the input for `MlflowClient.log_inputs`."""
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

        columns = [{"name": column.name, "type": _type(column.type)} for column in TURN_SCHEMA]
        profile = {"labels": self.labels, **self.counts} | ({} if self.fold is None else {"fold": self.fold})
        dataset = Dataset(
            name=self.name,
            digest=self.fingerprint[:DIGEST],
            source_type=urlsplit(self.address).scheme if "://" in self.address else "local",
            source=json.dumps({"uri": self.address}),
            schema=json.dumps({"mlflow_colspec": columns}),
            profile=json.dumps(profile),
        )
        return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, "training")])


def _type(column: pa.DataType) -> str:
    """Return the type of a column's values, independent of their encoding."""
    values = column.value_type if pa.types.is_dictionary(column) else column
    return str(values).removeprefix("large_")


def without_secrets(address: str) -> str:
    """Return a path as it is, and a URL without user, password and options, some of which are keys."""
    if "://" not in address:
        return address
    url = urlsplit(address)
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"

"""The corpus card: README.md of a prepared corpus, in Markdown with the front matter of a Hugging Face dataset card.

It depends only on the content of the corpus, its sources and the program, so the same inputs give the same bytes. It
has no absolute paths, no names of speakers and no words that were said.
"""

import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import yaml

from data.corpus.codebook import Codebook, shipped
from data.corpus.config import CorpusConfig
from data.corpus.decoding import StoredClip
from data.corpus.issues import Finding
from data.corpus.schema import SAMPLE_RATE, Corpus
from data.errors import storing
from data.formats import format_bytes, format_count, markdown_text
from data.report.summary import by_code, split_names, split_summaries
from data.shards.dataset import Shards

CARD = "README.md"
MOST_FILES = 20  # source files that are listed by name; one digest covers all
LIBRARIES = ("numpy", "pyarrow", "soundfile", "av")  # that decode and store what a corpus holds
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
# Identifiers of Hugging Face that corpora have; any other text is the name of a licence.
LICENSES = frozenset(
    "apache-2.0 mit cc cc0-1.0 cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-3.0 cc-by-nc-4.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 odbl odc-by pddl gpl-3.0 unlicense "
    "unknown other".split()
)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that turns of the corpus come from."""

    name: str  # relative to the source
    size: int  # bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class CorpusSource:
    """What a corpus was prepared from; take it before the preparation, which consumes the corpus."""

    format: str
    name: str | None  # of the file or folder; None: the corpus was made here
    audio: str | None  # name of the folder of recordings
    files: tuple[SourceFile, ...] = ()
    recordings: int = 0
    recording_bytes: int = 0
    code: str = ""  # version of the program

    @classmethod
    def of(cls, kind: str, source: Path | None, audio: Path | None, corpus: Corpus, code: str) -> "CorpusSource":
        """Return the source of a corpus that was just read.

        Args:
            kind: the format.
            source: the file or folder; None: the corpus was made here.
            audio: the folder of recordings.
            corpus: what the importer returned.
            code: version of the program.

        Raises:
            StorageError: a file of the source cannot be read.
        """
        turns = [turn for conversation in corpus.conversations for turn in conversation.turns]
        clips = {turn.clip.path if isinstance(turn.clip, StoredClip) else turn.clip for turn in turns}
        named = {conversation.recording for conversation in corpus.conversations} | clips
        named |= {turn.recording for turn in turns}
        read = {turn.where.rpartition(":")[0] for turn in turns} | {turn.where for turn in turns}
        heard = sorted(path for path in named if path is not None and path.is_file())
        return cls(
            format=kind,
            name=None if source is None else source.resolve().name,
            audio=None if audio is None else audio.resolve().name,
            files=() if source is None else tuple(_files(source, read)),
            recordings=len(heard),
            recording_bytes=sum(path.stat().st_size for path in heard),
            code=code,
        )

    @property
    def digest(self) -> str:
        """Return one digest of all files."""
        content = [(file.name, file.sha256) for file in self.files]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _files(source: Path, read: set[str]) -> Iterable[SourceFile]:
    """Yield the source, or the files of a folder that turns come from: beside them may be gigabytes that are not read.

    Args:
        source: the file or folder.
        read: names of the files that turns come from.
    """
    paths = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.name in read)
    for path in (path for path in paths if path.is_file()):
        name = path.name if path == source else path.relative_to(source).as_posix()
        with storing(path), path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            yield SourceFile(name, path.stat().st_size, digest)


def corpus_card(shards: Shards, findings: Sequence[Finding], source: CorpusSource) -> str:
    """Return the card of a corpus in Markdown.

    Args:
        shards: the prepared corpus.
        findings: of its preparation, in their order.
        source: what it was prepared from.
    """
    from jinja2 import Environment, StrictUndefined

    manifest = shards.manifest
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = lambda value: markdown_text(str(value))
    template = environment.from_string((files("data.report") / "card.md.j2").read_text(encoding="utf-8"))
    splits = split_summaries(shards)
    audio = sum(samples > 0 for samples in shards.columns["n_samples"]) > 0
    return template.render(
        manifest=manifest,
        config=manifest.config,
        source=source,
        most=MOST_FILES,
        front=_front_matter(shards, audio),
        splits=splits,
        roles=_roles(shards),
        audio=audio,
        rule=_split_rule(manifest.config),
        counts=[(label, [split.labels[label] for split in splits]) for label in manifest.labels],
        qualities=[(name, [split.qualities[name] for split in splits]) for name in manifest.qualities],
        recordings=_recording_digest(shards),
        book=manifest.config.codebook,
        findings=[
            (code, len(group), group[0].where, group[0].consequence) for code, group in by_code(findings).items()
        ],
        libraries=[f"{name} {version(name)}" for name in LIBRARIES],
        command=_command(source, manifest.config),
        settings=_settings(manifest.config),
        speakers=len(manifest.config.roles),
        format_count=format_count,
        format_bytes=format_bytes,
    )


def _front_matter(shards: Shards, audio: bool) -> str:
    """Return the metadata that the Hugging Face Hub reads."""
    manifest, given = shards.manifest, shards.manifest.config.license
    license_id = "unknown" if given is None else given.strip().lower()
    named = license_id not in LICENSES
    turns = sum(manifest.turns.values())
    content: dict[str, object] = {
        "license": "other" if named else license_id,
        **({"license_name": given} if named else {}),
        "pretty_name": f"{manifest.corpus}, {format_count(sum(manifest.sessions.values()), 'session')}",
        "task_categories": [*(["audio-classification"] if audio else []), "text-classification"],
        "size_categories": [next((name for limit, name in SIZES if turns < limit), "n>10M")],
        "tags": ["counselling", "dialogue", *(["speech"] if audio else [])],
    }
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)
    return text


def _roles(shards: Shards) -> list[tuple[str, int, int, int, float]]:
    """Return, for each split and role: turns, labelled turns, turns with audio, and hours."""
    columns = shards.columns
    turns, labelled, heard, samples = (Counter[tuple[str, str]]() for _ in range(4))
    names = split_names(shards)
    for key, label, count in zip(
        zip(names, columns["speaker"], strict=True), columns["label"], columns["n_samples"], strict=True
    ):
        turns[key] += 1
        labelled[key] += label is not None
        heard[key] += count > 0
        samples[key] += count
    order = list(dict.fromkeys([summary.name for summary in split_summaries(shards)]))
    keys = sorted(turns, key=lambda key: (order.index(key[0]), key[1]))
    return [
        (f"{split}, {role}", turns[key], labelled[key], heard[key], samples[key] / SAMPLE_RATE / 3600)
        for key in keys
        for split, role in [key]
    ]


def _recording_digest(shards: Shards) -> str:
    """Return a digest of all decoded audio, independent of the order; "" without audio."""
    names = ("recording_hash", "audio_hash")
    hashes = {digest for name in names for digest in shards.columns[name] if digest}
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest() if hashes else ""


def _split_rule(config: CorpusConfig) -> str:
    """Return how sessions were assigned to splits, in a sentence."""
    split = config.split
    if split.file is not None:
        return f"Sessions were assigned by the list {Path(split.file).name}."
    together = " or ".join(f"the same {name}" for name in split.by)
    shared = f"Sessions with {together}, and sessions that share audio, are in one group and in one split."
    if split.folds is not None:
        how = f"Groups were assigned to {split.folds} folds"
    else:
        how = "Groups were assigned to train, val and test in the shares " + ", ".join(map(str, split.fractions))
    balanced = f", balanced by {' and '.join(split.stratify)}" if split.stratify else ""
    return f"{shared} {how}{balanced}, with seed {split.seed}, unless the source has its own split."


def _command(source: CorpusSource, config: CorpusConfig) -> str:
    """Return the command that prepares the corpus again, with the names of files in place of paths."""
    words = ["sweep", "prepare", source.format, *([source.name] if source.name else [])]
    words += ["--audio", source.audio] if source.audio else []
    words += ["--config", "settings.yaml"] if _settings(config) else []
    return shlex.join([*words, "--out", "corpus"])


def _settings(config: CorpusConfig) -> str:
    """Return the settings that are not the defaults as YAML, without paths and names of speakers."""
    content = json.loads(config.model_dump_json(exclude_defaults=True, exclude={"roles", "codebook"}))
    if config.codebook is not None:
        content["codebook"] = _codebook_name(config.codebook)
    for section, key in (("split", "file"), ("align", "model")):
        path = content.get(section, {}).get(key)
        if path is not None and (section == "split" or Path(path).is_absolute() or Path(path).exists()):
            content[section][key] = Path(path).name
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000) if content else ""


def _codebook_name(book: Codebook) -> str:
    """Return the name of a shipped codebook, or "codebook.yaml"."""
    for name, file in shipped().items():
        if Codebook.model_validate(yaml.safe_load(file.read_text(encoding="utf-8"))) == book:
            return name
    return "codebook.yaml"

"""Sessions to be coded need neither codes nor a split; every turn that cannot be coded has a reason."""

import json
from pathlib import Path

from data.corpus.config import ColumnConfig, CorpusConfig
from data.preparation.shard_jobs import serially
from data.preparation.unlabelled import SPLIT, codable_items, prepare_sessions, read_sessions, reasons_not_coded
from data.report.summary import read_findings
from data.shards.dataset import Shards

ROLES = {"client": ("change", "neutral"), "therapist": ()}
SEGMENTS = [
    {"speaker": "T", "text": "so?", "start": 0, "end": 1},
    {"speaker": "C", "text": "well", "start": 1, "end": 2, "label": "an unknown code"},
    {"speaker": "S", "text": "who is it", "start": 2, "end": 3},
    {"speaker": "C", "text": "when", "start": "later", "end": 4},
]


def prepared(folder: Path) -> Shards:
    """Prepare a single session of WhisperX, fewer than there are splits."""
    (folder / "one.json").write_text(json.dumps({"segments": SEGMENTS}))
    config = CorpusConfig(columns=ColumnConfig(label="code"))
    corpus = read_sessions("whisperx", folder / "one.json", None, config, ROLES)
    return prepare_sessions(corpus, folder / "shards", config, None, serially)


def test_every_turn_is_an_item_or_has_a_reason(tmp_path: Path) -> None:
    shards = prepared(tmp_path)
    assert set(shards.columns["split"]) == {SPLIT}
    assert codable_items(shards, "classify", uses_audio=False) == [("classify", 1)]
    assert codable_items(shards, "therapist_behaviour", uses_audio=False) == []
    reasons = reasons_not_coded(shards, read_findings(shards), ["classify"], uses_audio=False)
    assert reasons.keys() == {0, 2, 3}
    assert reasons[0] == "only turns of the client are coded"
    assert reasons[2].startswith("speaker 'S' has no role; add it")
    assert reasons[3].startswith("time 'later' cannot be parsed")


def test_audio_model_needs_a_clip_of_each_turn(tmp_path: Path) -> None:
    shards = prepared(tmp_path)
    assert codable_items(shards, "classify", uses_audio=True) == []
    reasons = reasons_not_coded(shards, read_findings(shards), ["classify"], uses_audio=True)
    assert reasons.keys() == {0, 1, 2, 3}
    assert reasons[1] == "no audio: the turn has no recording"

"""No file is unpickled: other users may write to shared storage, and a pickle is a program."""

import ast
import io
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertConfig, Wav2Vec2BertForCTC

from data.shards.dataset import Shards
from model.alignment.ctc import load_ctc
from model.checkpoints import checkpoint
from model.checkpoints import peft_export as exported
from model.checkpoints.warm_start import load_parent
from model.encoders.loading import load_encoder
from model.speech_llm.adapter import read_tensors
from model.speech_llm.language_model import load_llm
from model.speech_llm.tokenizer import load_tokenizer
from sweep.analysis.predictions import read_predictions
from sweep.search.study import StudyStore
from tests.model import voices
from tests.security.mutations import outcome
from tests.sweep.common import settings

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE = {"np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"}


def nodes() -> Iterator[tuple[str, ast.AST]]:
    """Yield every node of the source with its file and line."""
    for package in ("data", "model", "sweep"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", node


def test_source_neither_unpickles_nor_runs_code() -> None:
    """No import of a module that unpickles, and no call that may do so unless an argument forbids it."""
    calls = set()
    for place, node in nodes():
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not FORBIDDEN & {part for name in names for part in name.split(".")}, place
        if isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
            assert name not in UNSAFE, place
            assert given.get("weights_only") == "True" or name != "torch.load", place
            assert given.get("trust_remote_code") == "False" or not name.endswith(".from_pretrained"), place
            calls.add(name)
    assert {"torch.load", "AutoModel.from_pretrained", "AutoModelForCausalLM.from_pretrained"} <= calls


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


KINDS = ("pickle", "old", "archive")  # by itself, in torch's old format, and in the archive that torch writes today


def poisoned(kind: str, mark: Path) -> bytes:
    content, sink = {"tensors": Payload(mark)}, io.BytesIO()
    if kind == "pickle":
        return pickle.dumps(content)
    torch.save(content, sink, _use_new_zipfile_serialization=kind == "archive")
    return sink.getvalue()


@pytest.fixture(params=KINDS)
def poison(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[bytes]:
    yield poisoned(request.param, tmp_path / "pwned")
    assert not (tmp_path / "pwned").exists(), "the payload was run"


def test_poison_runs_where_it_is_unpickled(tmp_path: Path) -> None:
    for kind in KINDS:
        content = poisoned(kind, tmp_path / kind)
        pickle.loads(content) if kind == "pickle" else torch.load(io.BytesIO(content), weights_only=False)
        assert (tmp_path / kind).exists()


def test_poisoned_files_of_a_sweep_are_refused(poison: bytes, tmp_path: Path) -> None:
    (folder := tmp_path / "trial").mkdir()
    for name in (checkpoint.FILE, "study.journal", "predictions.json"):
        (folder / name).write_bytes(poison + b"\n")  # a journal's last line may be unfinished
    assert "damaged checkpoint" in outcome(lambda: checkpoint.load(folder / checkpoint.FILE))
    assert "damaged checkpoint" in outcome(lambda: load_parent(str(folder)))
    assert "damaged study" in outcome(lambda: StudyStore.read(folder, settings()))
    assert "predictions.json: damaged" in outcome(lambda: read_predictions(folder))
    assert "not a file of tensors" in outcome(lambda: read_tensors(folder / checkpoint.FILE))


def test_poisoned_files_of_a_corpus_are_refused(poison: bytes, corpus: Shards, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(str(corpus.folder), tmp_path / "shards"))
    (folder / corpus.manifest.index).write_bytes(poison)
    assert "not a readable Arrow file" in outcome(lambda: Shards(folder).columns)
    (folder / "manifest.json").write_bytes(poison)
    assert "Invalid JSON" in outcome(lambda: Shards(folder))


def test_poisoned_export_is_refused(poison: bytes, tmp_path: Path) -> None:
    (tmp_path / exported.LABELS).write_bytes(poison)
    assert f"{exported.LABELS}: " in outcome(lambda: exported.read(tmp_path))
    fields = {"sweep": "a", "trial": 0, "corpus": "c", "fingerprint": "f", "roles": {}, "tasks": {}, "meaning": {}}
    (tmp_path / exported.LABELS).write_text(exported.Exported(**fields, digest="d").model_dump_json())
    (tmp_path / exported.SPEECH).write_bytes(poison)
    assert "its weights cannot be read" in outcome(lambda: exported.load_state(tmp_path))


@pytest.fixture(scope="module")
def ctc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained CTC model that loads."""
    folder, tokenizer = tmp_path_factory.mktemp("ctc"), voices.word_tokenizer()
    extractor = SeamlessM4TFeatureExtractor(feature_size=40, num_mel_bins=40)
    model = Wav2Vec2BertForCTC(Wav2Vec2BertConfig(vocab_size=len(tokenizer), **voices.SMALL))
    for part in (model, extractor, tokenizer):
        part.save_pretrained(folder)
    load_ctc(str(folder))
    return folder


def test_poisoned_base_models_are_refused(poison: bytes, models: Path, ctc: Path, tmp_path: Path) -> None:
    """Their weights are in pytorch_model.bin, as before safetensors."""
    folders = {}
    for original in (models / "hubert-group", models / "llm", ctc):
        folders[original] = folder = Path(shutil.copytree(original, tmp_path / original.name))
        for weights in folder.glob("*.safetensors*"):
            weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(poison)
    encoder, llm, aligner = map(str, folders.values())
    assert "cannot load an encoder" in outcome(lambda: load_encoder(encoder, "cpu"))
    assert "cannot load a causal LM" in outcome(lambda: load_llm(llm, "float32", "cpu"))
    assert "cannot load a CTC model" in outcome(lambda: load_ctc(aligner))


CODE = "import os\nos.mkdir({!r})\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"


def test_model_with_code_is_refused_without_a_question(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default, transformers asks whether to run it, and takes a yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = Path(shutil.copytree(models / "llm", tmp_path / "llm"))
    (folder / "own.py").write_text(CODE.format(str(tmp_path / "pwned")))
    config = (folder / "config.json").read_text()
    own = '{"auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}, '
    (folder / "config.json").write_text(config.replace("{", own, 1).replace('"llama"', '"own"'))
    for device in ("cpu", "meta"):
        assert "contains custom code" in outcome(lambda device=device: load_llm(str(folder), "float32", device))
    assert "contains custom code" in outcome(lambda: load_encoder(str(folder), "cpu"))
    outcome(lambda: load_tokenizer(str(folder)))
    assert not (tmp_path / "pwned").exists()

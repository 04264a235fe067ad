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
from tests.security.mutations import outcome
from tests.sweep.common import settings

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE = {"np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"}


def nodes() -> Iterator[tuple[str, ast.AST]]:
    """Every node of the source, and its place."""
    for package in ("data", "model", "sweep"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", node


def test_no_module_that_unpickles_is_imported() -> None:
    for place, node in nodes():
        names = [one.name for one in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not FORBIDDEN & {part for name in names for part in name.split(".")}, place


def test_every_call_that_may_unpickle_or_run_code_is_told_not_to() -> None:
    seen = set()
    for place, node in nodes():
        if isinstance(node, ast.Call):
            name, said = ast.unparse(node.func), {one.arg: ast.unparse(one.value) for one in node.keywords}
            assert name not in UNSAFE, place
            assert said.get("weights_only") == "True" or name != "torch.load", place
            assert said.get("trust_remote_code") == "False" or not name.endswith(".from_pretrained"), place
            seen.add(name)
    assert {"torch.load", "AutoModel.from_pretrained", "AutoModelForCausalLM.from_pretrained"} <= seen


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def poisons(mark: Path) -> dict[str, bytes]:
    """A pickle by itself, one in torch's old format, and one in the archive that torch writes today."""
    content = {"tensors": Payload(mark)}
    torch.save(content, archive := io.BytesIO())
    torch.save(content, old := io.BytesIO(), _use_new_zipfile_serialization=False)
    return {"pickle": pickle.dumps(content), "old": old.getvalue(), "archive": archive.getvalue()}


@pytest.fixture(params=["pickle", "old", "archive"])
def poison(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[bytes]:
    yield poisons(tmp_path / "pwned")[request.param]
    assert not (tmp_path / "pwned").exists(), "the payload was run"


def test_the_poison_is_one(tmp_path: Path) -> None:
    pickle.loads(poisons(tmp_path / "one")["pickle"])
    for name in ("old", "archive"):
        torch.load(io.BytesIO(poisons(tmp_path / name)[name]), weights_only=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "old", "one"]


def test_files_of_a_sweep(poison: bytes, tmp_path: Path) -> None:
    (folder := tmp_path / "trial").mkdir()
    for name in (checkpoint.FILE, "study.journal", "predictions.json"):
        (folder / name).write_bytes(poison + b"\n")  # a journal's last line may be unfinished
    assert "damaged checkpoint" in outcome(lambda: checkpoint.load(folder / checkpoint.FILE))
    assert "damaged checkpoint" in outcome(lambda: load_parent(str(folder)))
    assert "damaged study" in outcome(lambda: StudyStore.read(folder, settings()))
    assert "predictions.json: damaged" in outcome(lambda: read_predictions(folder))
    assert "not a file of tensors" in outcome(lambda: read_tensors(folder / checkpoint.FILE))


def test_files_of_a_corpus(poison: bytes, corpus: Shards, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(str(corpus.folder), tmp_path / "shards"))
    (folder / corpus.manifest.index).write_bytes(poison)
    assert "not a readable Arrow file" in outcome(lambda: Shards(folder).columns)
    (folder / "manifest.json").write_bytes(poison)
    assert "Invalid JSON" in outcome(lambda: Shards(folder))


def test_files_of_an_exported_model(poison: bytes, tmp_path: Path) -> None:
    (tmp_path / exported.LABELS).write_bytes(poison)
    assert f"{exported.LABELS}: " in outcome(lambda: exported.read(tmp_path))
    said = {"sweep": "a", "trial": 0, "corpus": "c", "fingerprint": "f", "roles": {}, "tasks": {}, "meaning": {}}
    (tmp_path / exported.LABELS).write_text(exported.Exported(**said, digest="d").model_dump_json())
    (tmp_path / exported.SPEECH).write_bytes(poison)
    assert "its weights cannot be read" in outcome(lambda: exported.load_state(tmp_path))


def in_place_of_weights(original: Path, folder: Path, content: bytes) -> str:
    """A copy of a model's folder whose weights lie in pytorch_model.bin, as before safetensors."""
    shutil.copytree(original, folder)
    for weights in folder.glob("*.safetensors*"):
        weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    return str(folder)


def test_base_models(poison: bytes, models: Path, ctc: Path, tmp_path: Path) -> None:
    encoder = in_place_of_weights(models / "hubert-group", tmp_path / "encoder", poison)
    llm = in_place_of_weights(models / "llm", tmp_path / "llm", poison)
    aligner = in_place_of_weights(ctc, tmp_path / "ctc", poison)
    assert "cannot load an encoder" in outcome(lambda: load_encoder(encoder, "cpu"))
    assert "cannot load a causal LM" in outcome(lambda: load_llm(llm, "float32", "cpu"))
    assert "cannot load a CTC model" in outcome(lambda: load_ctc(aligner))


CODE = "import os\nos.mkdir({!r})\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"


def test_a_model_that_brings_code_is_refused_and_nobody_is_asked(
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

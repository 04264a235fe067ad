"""The identity of pretrained models: it follows the content of the files, and costs nothing the second time."""

import json
import os
import shutil
from pathlib import Path

import pytest

from model.checkpoints import fingerprint
from model.checkpoints.base_files import Part
from model.checkpoints.fingerprint import (
    BaseIdentity,
    OtherBaseError,
    file_digest,
    identify,
    refuse_other_bases,
    start_identity,
)
from model.encoders.frozen_features import encoder_digest
from model.encoders.loading import load_encoder
from model.objectives.teacher import llm_digest
from model.speech_llm.tokenizer import load_tokenizer
from tests.model.test_base_files import shard


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder; every file is worth a place in it."""
    monkeypatch.setenv("SWEEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "LARGE", 0)
    monkeypatch.setattr(fingerprint, "_digests", {})
    return tmp_path / "cache"


@pytest.fixture
def llm(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "llm", tmp_path / "llm"))


def digest(folder: Path, part: Part = "llm") -> str:
    identity = identify("model.llm.path", str(folder), part)
    assert identity is not None
    return identity.digest


def flip(path: Path) -> None:
    """Change the last byte of a file."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_identity_follows_what_changes_results(llm: Path, tmp_path: Path) -> None:
    before = digest(llm)
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"transformers_version": "9", "dtype": "bfloat16"}, indent=7))
    (llm / "README.md").write_text("a card")
    (llm / "generation_config.json").write_text("{}")
    assert digest(llm) == before, "neither the layout nor what is not read counts"
    assert digest(Path(llm.rename(tmp_path / "moved"))) == before
    (tmp_path / "moved").rename(llm)
    digests = {before}
    flip(llm / "model.safetensors")
    digests.add(digest(llm))
    (llm / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    digests.add(digest(llm))
    (llm / "tokenizer.json").write_text((llm / "tokenizer.json").read_text().replace("sustain", "sustaim"))
    digests.add(digest(llm))
    (llm / "chat_template.jinja").write_text("{{ messages }}")
    digests.add(digest(llm))
    assert len(digests) == 5


def test_identity_of_an_encoder_has_its_extractor(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "whisper", tmp_path / "m"))
    before = digest(folder, "encoder")
    (folder / "tokenizer.json").write_text("{}")
    assert digest(folder, "encoder") == before
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hop_length": 80}))
    assert digest(folder, "encoder") != before


def test_each_shard_counts(llm: Path) -> None:
    shard()(llm)
    before = digest(llm)
    flip(llm / "model-00002-of-00002.safetensors")
    assert digest(llm) != before


def test_second_identity_reads_no_weights(llm: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in this process nor in the next one, which has the user's cache only."""
    before = digest(llm)
    monkeypatch.setattr(fingerprint.hashlib, "file_digest", lambda *_: pytest.fail("a file was read again"))
    assert digest(llm) == before
    fingerprint._digests.clear()
    assert digest(llm) == before
    assert len(list(cache.rglob("*.json"))) >= 2


def test_changed_file_of_the_same_size_is_read_again(llm: Path, cache: Path) -> None:
    path, before = llm / "model.safetensors", digest(llm)
    stat = path.stat()
    flip(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `cp --preserve` and rsync do
    assert digest(llm) != before
    fingerprint._digests.clear()
    assert digest(llm) != before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 1}', '{"key": null, "digest": 3}'])
def test_damaged_cache_is_read_as_none(content: str, llm: Path, cache: Path) -> None:
    before = digest(llm)
    for path in cache.rglob("*.json"):
        path.write_text(content)
    fingerprint._digests.clear()
    assert digest(llm) == before


def test_home_that_cannot_be_written_is_no_mistake(llm: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(llm)
    shutil.rmtree(cache)
    cache.write_text("in the way of the folder")
    fingerprint._digests.clear()
    assert digest(llm) == before
    monkeypatch.delenv("SWEEP_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    fingerprint._digests.clear()
    assert digest(llm) == before


def test_identity_of_an_id_has_its_revision(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layout of the hub's cache, which needs no network."""
    repository, commit = tmp_path / "models--org--model", "5a" * 20
    shutil.copytree(models / "llm", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    identity = identify("model.llm.path", "org/model", "llm")
    assert identity == BaseIdentity(path="org/model", digest=digest(models / "llm"), revision=commit)
    assert str(identity) == f"{identity.digest} (revision 5a5a5a5a5a5a)"


def test_keys_of_the_feature_cache_stay_and_are_kept(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are hashes of tensors, computed once for each identity and not once for each path and process."""
    folder = Path(shutil.copytree(models / "whisper", tmp_path / "m"))
    keys = encoder_digest(str(folder)), llm_digest(str(models / "llm"), "float32")
    fingerprint._digests.clear()
    for name in ("model.encoders.frozen_features.load_encoder", "model.objectives.teacher.load_llm"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("the model was loaded again"))
    assert (encoder_digest(str(folder)), llm_digest(str(models / "llm"), "float32")) == keys
    monkeypatch.undo()
    flip(folder / "model.safetensors")
    assert encoder_digest(str(folder)) != keys[0], "in the same process"


def test_changed_folder_is_loaded_again(models: Path, tmp_path: Path) -> None:
    """A process that lives longer than its weights does not compute with the former ones."""
    folder = Path(shutil.copytree(models / "whisper", tmp_path / "m"))
    first = load_encoder(str(folder), "cpu")
    assert load_encoder(str(folder), "cpu") is first
    flip(folder / "model.safetensors")
    assert load_encoder(str(folder), "cpu") is not first


def test_changed_tokenizer_is_loaded_again(llm: Path) -> None:
    first = load_tokenizer(str(llm))
    assert load_tokenizer(str(llm)) is first
    (llm / "tokenizer.json").write_text((llm / "tokenizer.json").read_text() + " ")
    assert load_tokenizer(str(llm)) is not first


def test_other_base_is_one_line_with_both_digests() -> None:
    then = {name: BaseIdentity(path=name, digest="a" * 16) for name in ("x", "y", "z")}
    now = {"x": then["x"], "y": BaseIdentity(path="y", digest="b" * 16), "new": then["x"]}
    with pytest.raises(OtherBaseError, match=f"^s: .*y was {'a' * 16} and is now {'b' * 16}.*--allow-other-base$"):
        refuse_other_bases("s", then, now)
    refuse_other_bases("s", then, {**now, "y": then["y"].model_copy(update={"revision": "new", "path": "moved"})})


def test_start_identity_follows_the_files(tmp_path: Path) -> None:
    (folder := tmp_path / "coder").mkdir()
    digests = {start_identity(str(folder)).digest}
    for name in ("labels.json", "speech.safetensors", "checkpoint.pt", "adapter_config.json"):
        (folder / name).write_text("x")
        digests.add(start_identity(str(folder)).digest)
    digests.add(start_identity(str(folder / "labels.json")).digest)
    assert len(digests) == 6
    assert file_digest(folder / "labels.json") == file_digest(folder / "checkpoint.pt")

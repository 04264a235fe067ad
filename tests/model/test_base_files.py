"""The files of pretrained models and of PEFT adapters: what is missing or damaged is named, without torch."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.errors import ConfigError
from model.checkpoints.base_files import check_adapter, check_model, download, model_files
from model.config import LoraSettings

Damage = Callable[[Path], None]
ADAPTER = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 32,
    "target_modules": ["v_proj", "q_proj"],
    "base_model_name_or_path": "org/base",
}


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def cut(name: str, left: int) -> Damage:
    """Leave the first bytes of a file, or all but the last ones."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:left]) and None


def replace(name: str, content: str | bytes) -> Damage:
    return lambda folder: (
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def shard(*damages: Damage) -> Damage:
    """Write the weights as two files with an index, as large models have, and damage them."""

    def split(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        names, index = sorted(tensors), {}
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        (folder / "model.safetensors").unlink()
        for damage in damages:
            damage(folder)

    return split


def as_bin(*damages: Damage) -> Damage:
    """Write the weights as torch does, and damage them."""

    def convert(folder: Path) -> None:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        for damage in damages:
            damage(folder)

    return convert


def only_gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "tiny.Q4_K_M.gguf")


def adapter_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))


def adapter_alone(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    adapter_beside(folder)


SECOND = "model-00002-of-00002.safetensors"
LLM: dict[str, tuple[Damage, str]] = {
    "no weights": (remove("model.safetensors"), r"lacks model.safetensors \(the weights\)"),
    "no settings": (remove("config.json"), r"lacks config.json \(the settings of the model\)"),
    "no tokenizer": (remove("tokenizer.json"), r"lacks tokenizer.json \(the tokenizer\)"),
    "cut at its end": (cut("model.safetensors", -1), "model.safetensors has "),
    "cut in its header": (cut("model.safetensors", 100), r"model.safetensors is damaged or cut off \(100 bytes\)"),
    "empty": (cut("model.safetensors", 0), r"model.safetensors is damaged or cut off \(0 bytes\)"),
    "pointer": (replace("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "a pointer of Git LFS"),
    "settings cut": (cut("config.json", 40), "config.json is damaged: it is no JSON"),
    "settings of nothing": (replace("config.json", "[]"), "config.json is damaged: it is no JSON object"),
    "tokenizer cut": (cut("tokenizer.json", -9), "tokenizer.json is damaged: it is no JSON"),
    "no shard": (shard(remove(SECOND)), f"lacks {SECOND}, which model.safetensors.index.json names"),
    "shard cut": (shard(cut(SECOND, -8)), f"{SECOND} has "),
    "index cut": (shard(cut("model.safetensors.index.json", 30)), "model.safetensors.index.json is damaged"),
    "index of nothing": (shard(replace("model.safetensors.index.json", "{}")), "index.json lists no weights"),
    "bin cut": (as_bin(cut("pytorch_model.bin", -50)), "pytorch_model.bin is damaged or cut off"),
    "GGUF": (only_gguf, r"it holds GGUF files.* \(tiny.Q4_K_M.gguf\): name the model that they were converted from"),
    "adapter beside": (adapter_beside, "holds a PEFT adapter .* beside the model, which would be loaded on top"),
    "adapter": (
        adapter_alone,
        "is a PEFT adapter, and no model; start LoRA from it with --set model.llm.path=org/base --set "
        r"model.lora.init_from=\S+ --set model.lora.rank=8 --set model.lora.alpha=32 --set "
        r"'model.lora.targets=\[q_proj, v_proj\]'",
    ),
}
ENCODER = {"no extractor": (remove("preprocessor_config.json"), "lacks preprocessor_config.json")}
INTACT: dict[str, Damage] = {
    "shards": shard(),
    "bin": as_bin(),
    "legacy bin": as_bin(
        lambda folder: torch.save({}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    ),
    "vocabulary": lambda folder: (folder / "tokenizer.json").rename(folder / "vocab.json") and None,
}


@pytest.mark.parametrize("name", LLM)
def test_damaged_llm_is_one_line_that_names_the_file(name: str, models: Path, tmp_path: Path) -> None:
    damage, message = LLM[name]
    damage(folder := Path(shutil.copytree(models / "llm", tmp_path / "m")))
    with pytest.raises(ConfigError, match=f"^model.llm.path: {folder}: .*{message}") as error:
        check_model("model.llm.path", str(folder), "llm")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in LLM if "tokenizer" not in name] + [*ENCODER])
def test_damaged_encoder_is_one_line(name: str, models: Path, tmp_path: Path) -> None:
    damage, message = (ENCODER | LLM)[name]
    damage(folder := Path(shutil.copytree(models / "whisper", tmp_path / "m")))
    with pytest.raises(ConfigError, match=message):
        check_model("model.encoder.path", str(folder), "encoder")


@pytest.mark.parametrize("name", INTACT)
def test_other_layouts_are_intact(name: str, models: Path, tmp_path: Path) -> None:
    check_model("model.llm.path", str(models / "llm"), "llm")
    INTACT[name](folder := Path(shutil.copytree(models / "llm", tmp_path / "m")))
    files = model_files(folder, "llm")
    assert {file.suffix for file in files.weights} <= {".safetensors", ".bin"}
    assert len(files.weights) == (2 if name == "shards" else 1)


def test_path_that_is_no_folder_is_one_line(models: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    shutil.copytree(models / "llm", tmp_path / "outer" / "llm")
    for path, message in {
        tmp_path / "m.gguf": "is a file; name the folder of a model .name the model that they were converted from",
        tmp_path / "nowhere": "no such folder; check the path",
        tmp_path / "outer": "lacks config.json .*; a model is in .*outer/llm$",
    }.items():
        with pytest.raises(ConfigError, match=f"^model.llm.path: {path}: {message}"):
            check_model("model.llm.path", str(path), "llm")
    with pytest.raises(ConfigError, match="neither a folder nor an id of the Hugging Face hub"):
        check_model("model.llm.path", "no id", "llm")


def test_id_that_is_not_downloaded_is_no_mistake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert check_model("model.llm.path", "org/model", "llm") is None
    with pytest.raises(ConfigError, match="org/model: neither a folder, nor downloaded, and the hub does not send it"):
        download("model.llm.path", "org/model", "llm")


def test_missing_files_of_an_id_are_downloaded(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub is a folder here: only the files that a download asks for are copied."""
    shard()(repository := Path(shutil.copytree(models / "llm", tmp_path / "hub")))
    commit = tmp_path / "cache/models--org--model/snapshots/abc"

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        assert name == "org/model"
        commit.mkdir(parents=True, exist_ok=True)
        for path in repository.iterdir():
            if path.name in allow_patterns:
                shutil.copy(path, commit)
        return str(commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    files = download("model.llm.path", "org/model", "llm")
    assert [path.name for path in files.weights] == ["model-00001-of-00002.safetensors", SECOND]
    assert {path.parent for path in files.weights} == {commit}


def write_adapter(folder: Path, **changed: Any) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | changed))
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
    return str(folder)


def test_adapter_that_fits_is_accepted(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a")
    for lora in (
        LoraSettings(),
        LoraSettings(alpha=1, alpha_ratio=4),
        LoraSettings(targets="all-linear"),  # which layers these are only the LLM tells
        LoraSettings(alpha=4 * 8**0.5, rslora=True),
    ):
        assert check_adapter(lora, path) == tmp_path / "a/adapter_model.safetensors"


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 16, "lora_alpha": 64}, "has rank 16, and the configuration rank 8; use --set model.lora.rank=16$"),
    "scale": ({"lora_alpha": 8}, "has scale 1, and the configuration scale 4; use --set model.lora.alpha=8$"),
    "rslora": ({"use_rslora": True}, "scale 11.3.* use --set model.lora.alpha=32 --set model.lora.rslora=true$"),
    "DoRA": ({"use_dora": True}, "has DoRA True.* use --set model.lora.dora=true$"),
    "targets": ({"target_modules": ["k_proj"]}, r"targets \[k_proj\], .* --set 'model.lora.targets=\[k_proj\]'$"),
    "all": (
        {"r": 4, "target_modules": ["o_proj"]},
        r"has rank 4, scale 8, targets \[o_proj\], and the configuration rank 8, scale 4, targets \[q_proj, v_proj\]; ",
    ),
    "another kind": ({"peft_type": "IA3"}, "is an adapter of the kind IA3"),
    "PiSSA": (
        {"init_lora_weights": "pissa_niter_4"},
        "=pissa_niter_4, which changes the base weights",
    ),
    "head": ({"modules_to_save": ["lm_head"]}, "uses modules_to_save, and only plain LoRA"),
    "ranks by layer": ({"rank_pattern": {"q_proj": 4}}, "uses rank_pattern, and only plain LoRA"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_adapter_that_does_not_fit_is_one_line(name: str, tmp_path: Path) -> None:
    changed, message = MISFITS[name]
    path = write_adapter(tmp_path / "a", **changed)
    with pytest.raises(ConfigError, match=f"^model.lora.init_from: {path}: .*{message}") as error:
        check_adapter(LoraSettings(targets=["q_proj", "v_proj"]), path)
    assert "\n" not in str(error.value)


def test_missing_or_damaged_adapter_is_one_line(tmp_path: Path) -> None:
    path = Path(write_adapter(tmp_path / "a"))
    write_adapter(path / "lora")
    for damage, message in {
        cut("adapter_model.safetensors", -1): "adapter_model.safetensors has ",
        remove("adapter_model.safetensors"): "lacks adapter_model.safetensors",
        remove("adapter_config.json"): f"lacks adapter_config.json; one is in {path}/lora",
        shutil.rmtree: "no such folder; name the folder of a PEFT adapter",
    }.items():
        damage(path)
        with pytest.raises(ConfigError, match=f"^model.lora.init_from: {path}: {message}"):
            check_adapter(LoraSettings(), str(path))


def test_checks_and_identities_import_no_torch(models: Path) -> None:
    code = (
        "import sys; from model.checkpoints.fingerprint import identify; "
        f"identify('model.llm.path', {str(models / 'llm')!r}, 'llm'); "
        "sys.exit(' '.join({'torch', 'transformers', 'peft'} & sys.modules.keys()) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")

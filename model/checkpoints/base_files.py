"""The files of a pretrained model or of a PEFT adapter: which ones count, and whether they are there and whole.

Everything here reads names, sizes and headers, and never a tensor. Nothing imports torch, so that a sweep can be
checked before anything starts.
"""

import functools
import json
import math
import shlex
import zipfile
from pathlib import Path
from typing import Literal, NamedTuple

from data.errors import ConfigError, UnavailableError, listed, reason
from model.config import LoraSettings, ModelConfig

Part = Literal["encoder", "llm", "audio-llm", "ctc"]

CONFIG = "config.json"
SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
EXTRACTOR = ("preprocessor_config.json", "processor_config.json")
TOKENIZER = "tokenizer.json"  # where it exists, transformers reads no other vocabulary
VOCABULARIES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "tekken.json")
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# Audio LLMs that are published with a LoRA adapter in their folder, which belongs to the model.
WITH_ADAPTER = ("granite_speech",)
# Kinds of LoRA whose start takes a part of the base weights away, and settings that plain LoRA does without.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
NOT_PLAIN = (
    "bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "lora_bias",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
)
LFS_POINTER = b"version https://git-lfs"
LEGACY_BIN = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch began its files before they were zip archives
MAX_HEADER = 100 * 2**20  # bytes: the limit of safetensors itself
OTHER_FORMATS = {  # by the end of a file's name
    ".gguf": "GGUF files, which llama.cpp reads",
    ".pth": "weights in their author's own format",
    ".h5": "TensorFlow weights",
    ".msgpack": "Flax weights",
    ".onnx": "ONNX files",
    ".nemo": "NeMo files",
}


class FilesError(Exception):
    """The files of a model cannot be used; the message says which one and what to do.

    Args:
        message: in one line.
        is_missing: whether a file is only missing, which a download may change.
    """

    def __init__(self, message: str, is_missing: bool = False) -> None:
        super().__init__(message)
        self.is_missing = is_missing


class ModelFiles(NamedTuple):
    """The files of a model that decide what it computes."""

    weights: list[Path]
    settings: list[Path]  # JSON files
    tokenizer: list[Path]  # empty for a part without a tokenizer


def base_models(config: ModelConfig) -> list[tuple[str, str, Part]]:
    """Return the pretrained models of a configuration: the setting, the path, and what each is used as."""
    models: list[tuple[str, str, Part]] = [("model.llm.path", config.llm.path, "llm")]
    if not config.uses_audio:
        return models
    return [encoder_base(config)] if config.encoder.path is None else [*models, encoder_base(config)]


def encoder_base(config: ModelConfig) -> tuple[str, str, Part]:
    """Return the pretrained model that has the encoder, as `base_models` does."""
    if config.encoder.path is None:
        return ("model.llm.path", config.llm.path, "audio-llm")
    return ("model.encoder.path", config.encoder.path, "encoder")


def check_model(setting: str, path: str, part: Part) -> ModelFiles | None:
    """Check the files of a model.

    Args:
        setting: key of the configuration, for messages.
        path: Hugging Face id or local folder. What an id lacks in the local cache is downloaded later.
        part: what the model is used as, which decides whether it needs a tokenizer or a feature extractor.

    Returns:
        The files; None for an id of which some are not downloaded.

    Raises:
        UnavailableError: a file is missing or damaged, in one line that names it.
    """
    try:
        folder = local_folder(path)
        return None if folder is None else model_files(folder, part)
    except FilesError as error:
        if error.is_missing and is_hub_id(path):
            return None
        raise UnavailableError(f"{setting}: {path}: {error}") from None
    except OSError as error:
        raise UnavailableError(f"{setting}: {path}: cannot be read ({error.strerror}); check rights and disk") from None


def is_hub_id(path: str) -> bool:
    """Return whether a path can only be an id of the Hugging Face hub: it is no file, and not spelled like one."""
    looks_local = Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") > 1
    return not (looks_local or Path(path).exists())


def local_folder(path: str) -> Path | None:
    """Return the folder of a model; None for an id of the hub of which nothing was downloaded.

    Raises:
        FilesError: there is no such folder.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.is_file():
        advice = f" ({_gguf_advice()})" if folder.suffix == ".gguf" else ""
        raise FilesError(f"is a file; name the folder of a model{advice}")
    if not is_hub_id(path):
        raise FilesError("no such folder; check the path", is_missing=True)
    return _snapshot(path)


def _snapshot(name: str) -> Path | None:
    """Return the folder of the newest commit of an id in the cache of the hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, CONFIG)
    except HFValidationError:
        raise FilesError("neither a folder nor an id of the Hugging Face hub; check the path") from None
    return Path(config).parent if isinstance(config, str) else None


def download(setting: str, path: str, part: Part) -> ModelFiles:
    """Return the files of a model, those of an id downloaded where they are missing.

    Raises:
        UnavailableError: see `check_model`; or a file cannot be downloaded.
    """
    files = check_model(setting, path, part)
    if files is not None:
        return files
    from huggingface_hub import snapshot_download

    names = [
        CONFIG,
        ADAPTER_CONFIG,
        *ADAPTER_WEIGHTS[:1],
        *EXTRACTOR,
        TOKENIZER,
        *VOCABULARIES,
        "merges.txt",
        *TOKENIZER_SETTINGS,
        SAFE,
        SAFE_INDEX,
    ]
    try:
        folder = Path(snapshot_download(path, allow_patterns=names))
        if not (folder / SAFE).exists() and not (folder / SAFE_INDEX).exists():
            snapshot_download(path, allow_patterns=[BIN, BIN_INDEX])
        for index in (SAFE_INDEX, BIN_INDEX):
            if (folder / index).exists():
                snapshot_download(path, allow_patterns=_shards(folder / index))
        return model_files(folder, part)
    except FilesError as error:
        raise UnavailableError(f"{setting}: {path}: {error}") from None
    except Exception as error:  # the hub raises many types
        raise UnavailableError(
            f"{setting}: {path}: neither a folder, nor downloaded, and the hub does not send it ({reason(error)})"
        ) from None


def model_files(folder: Path, part: Part) -> ModelFiles:
    """Return the files of a model, each of which is there and whole as far as sizes and headers tell.

    Args:
        folder: of the model, as transformers loads it.
        part: what the model is used as.

    Raises:
        FilesError: names the file that is missing or damaged.
    """
    if not (with_adapter := has_bundled_adapter(folder)):
        _refuse_adapter(folder)
    if not (folder / CONFIG).exists():
        raise _missing(folder, CONFIG, "the settings of the model")
    settings, tokenizer = [folder / CONFIG], list[Path]()
    read_json(folder / CONFIG)
    weights = _weights(folder)
    if with_adapter:
        weights.append(adapter_weights(folder))
        settings.append(folder / ADAPTER_CONFIG)
    if part != "llm":
        extractor = [folder / name for name in EXTRACTOR if (folder / name).exists()]
        if not extractor:
            raise _missing(folder, EXTRACTOR[0], "the settings of its feature extractor")
        settings += extractor
    if part != "encoder":
        tokenizer = _tokenizer(folder)
    for path in (*settings[1:], *tokenizer):
        if path.suffix == ".json":
            stat = path.stat()
            _check_json(path, (stat.st_size, stat.st_mtime_ns))
    return ModelFiles(weights, settings, tokenizer)


def has_bundled_adapter(folder: Path) -> bool:
    """Return whether a folder holds a model with a LoRA adapter that belongs to it."""
    if not (folder / CONFIG).exists() or not (folder / ADAPTER_CONFIG).exists():
        return False
    config = read_json(folder / CONFIG)
    return config.get("model_type") in WITH_ADAPTER and bool(config.get("has_lora_adapter", True))


def _refuse_adapter(folder: Path) -> None:
    """Refuse a PEFT adapter in place of a model, or beside one: transformers would load it on top without a word."""
    if not (folder / ADAPTER_CONFIG).exists():
        return
    adapter = read_json(folder / ADAPTER_CONFIG)
    if (folder / CONFIG).exists():
        raise FilesError(
            f"holds a PEFT adapter ({ADAPTER_CONFIG}) beside the model, which would be loaded on top; move it to "
            "another folder, and name that with model.lora.init_from"
        )
    base = adapter.get("base_model_name_or_path") or "BASE"
    settings = {"model.llm.path": str(base), "model.lora.init_from": str(folder), **adapter_settings(adapter)}
    options = " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in settings.items())
    raise FilesError(f"is a PEFT adapter, and no model; start LoRA from it with {options}")


def adapter_settings(adapter: dict[str, object]) -> dict[str, str]:
    """Return the settings that LoRA needs to start from an adapter, by key, as `--set` takes them."""
    targets = _targets(adapter)
    names = f"[{', '.join(targets)}]" if targets else str(adapter.get("target_modules"))
    flags = {"model.lora.rslora": adapter.get("use_rslora"), "model.lora.dora": adapter.get("use_dora")}
    return {
        "model.lora.rank": str(adapter.get("r")),
        "model.lora.alpha": str(adapter.get("lora_alpha")),
        "model.lora.targets": names,
        **{key: "true" for key, value in flags.items() if value},
    }


def _targets(adapter: dict[str, object]) -> list[str]:
    """Return the layers and the fused experts that an adapter adapts; none if a pattern stands for them."""
    layers, experts = adapter.get("target_modules"), adapter.get("target_parameters")
    names = [*layers, *(experts if isinstance(experts, list) else [])] if isinstance(layers, list) else []
    return sorted(map(str, names))


def _weights(folder: Path) -> list[Path]:
    """Return the files of the weights, in the order in which transformers looks for them."""
    for name in (SAFE, SAFE_INDEX, BIN, BIN_INDEX):
        path = folder / name
        if not path.exists():
            continue
        files = [folder / shard for shard in _shards(path)] if path.suffix == ".json" else [path]
        for file in files:
            if not file.exists():
                raise FilesError(f"lacks {file.name}, which {name} names; copy the folder again", is_missing=True)
            check_tensors(file)
        return files
    raise _missing(folder, SAFE, "the weights")


def _shards(index: Path) -> list[str]:
    """Return the names of the files that an index lists."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise FilesError(f"{index.name} lists no weights; copy the folder again")
    return sorted(set(map(str, names.values())))


def check_tensors(path: Path) -> None:
    """Check that a file of tensors is as long as its header says.

    Raises:
        FilesError: it is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise FilesError(f"{path.name} is a pointer of Git LFS, and not the weights; run `git lfs pull` in it")
        if path.suffix != ".safetensors":
            if not zipfile.is_zipfile(path) and start[: len(LEGACY_BIN)] != LEGACY_BIN:
                raise FilesError(f"{path.name} is damaged or cut off ({size:,} bytes); copy it again")
            return
        length = int.from_bytes(start[:8], "little")
        file.seek(8)
        header = file.read(length) if length <= min(size - 8, MAX_HEADER) else b""
    try:
        tensors = json.loads(header)
        ends = [int(tensor["data_offsets"][1]) for name, tensor in tensors.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise FilesError(f"{path.name} is damaged or cut off ({size:,} bytes); copy it again") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise FilesError(f"{path.name} has {size:,} bytes, and its header says {expected:,}; copy it again")


def _tokenizer(folder: Path) -> list[Path]:
    """Return the files of the tokenizer."""
    settings = [folder / name for name in TOKENIZER_SETTINGS if (folder / name).exists()]
    templates = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if (folder / TOKENIZER).exists():
        return [folder / TOKENIZER, *settings, *templates]
    vocabularies = [folder / name for name in VOCABULARIES if (folder / name).exists()]
    vocabularies += sorted(folder.glob("*.tiktoken"))
    if not vocabularies:
        raise _missing(folder, TOKENIZER, "the tokenizer")
    merges = [folder / "merges.txt"] if (folder / "merges.txt").exists() else []
    return [*vocabularies, *merges, *settings, *templates]


def _missing(folder: Path, name: str, what: str) -> FilesError:
    """Return the error for a missing file, with what the folder holds in its place."""
    names = sorted(entry.name for entry in folder.iterdir())
    for suffix, words in OTHER_FORMATS.items():
        if others := [other for other in names if other.endswith(suffix)]:
            advice = _gguf_advice() if suffix == ".gguf" else f"convert them to a folder with {SAFE}"
            return FilesError(f"lacks {name} ({what}); it holds {words} ({listed(others)}): {advice}")
    if inner := [entry for entry in sorted(folder.glob("*/config.json")) if entry.is_file()]:
        return FilesError(f"lacks {name} ({what}); a model is in {inner[0].parent}", is_missing=True)
    return FilesError(f"lacks {name} ({what}); copy it there, or name a complete folder", is_missing=True)


def _gguf_advice() -> str:
    return f"name the model that they were converted from, by Hugging Face id or folder with {SAFE}"


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object.

    Raises:
        FilesError: the file is missing, or something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FilesError(f"lacks {path.name}; copy it there", is_missing=True) from None
    except (ValueError, RecursionError):
        raise FilesError(f"{path.name} is damaged: it is no JSON; copy it again") from None
    if not isinstance(content, dict):
        raise FilesError(f"{path.name} is damaged: it is no JSON object; copy it again")
    return content


@functools.lru_cache(maxsize=64)
def _check_json(path: Path, stamp: tuple[int, int]) -> None:
    """Check that a file is JSON, once for each size and time: parsing a large vocabulary takes half a second."""
    read_json(path)


def adapter_weights(folder: Path) -> Path:
    """Return the file of an adapter's tensors.

    Raises:
        FilesError: the folder holds no adapter, or its weights are missing or damaged.
    """
    if not folder.is_dir():
        raise FilesError("no such folder; name the folder of a PEFT adapter", is_missing=True)
    if not (folder / ADAPTER_CONFIG).exists():
        inner = sorted(folder.glob(f"*/{ADAPTER_CONFIG}"))
        where = f"; one is in {inner[0].parent}" if inner else "; name the folder of a PEFT adapter"
        raise FilesError(f"lacks {ADAPTER_CONFIG}{where}", is_missing=True)
    for name in ADAPTER_WEIGHTS:
        if (folder / name).exists():
            check_tensors(folder / name)
            return folder / name
    raise FilesError(f"lacks {ADAPTER_WEIGHTS[0]} (its weights); copy it there", is_missing=True)


def check_adapter(lora: LoraSettings, folder: str) -> Path:
    """Check that LoRA can start from a PEFT adapter, as far as its settings tell, and return its file of tensors.

    Raises:
        UnavailableError: a file is missing or damaged.
        ConfigError: the adapter has another rank, scale or other targets than `lora`, or is no plain LoRA.
    """
    try:
        weights = adapter_weights(Path(folder))
        adapter = read_json(Path(folder) / ADAPTER_CONFIG)
        misfit = not_plain_lora(adapter) or _difference(lora, adapter)
    except FilesError as error:
        raise UnavailableError(f"model.lora.init_from: {folder}: {error}") from None
    except OSError as error:
        message = f"cannot be read ({error.strerror}); check rights and disk"
        raise UnavailableError(f"model.lora.init_from: {folder}: {message}") from None
    if misfit:
        raise ConfigError(f"model.lora.init_from: {folder}: {misfit}")
    return weights


def not_plain_lora(adapter: dict[str, object]) -> str:
    """Return why LoRA cannot start from an adapter, whatever its settings; empty if it can."""
    if adapter.get("peft_type") != "LORA":
        return f"is an adapter of the kind {adapter.get('peft_type')}; only LoRA can be a start"
    start = adapter.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(CHANGES_BASE):
        return (
            f"was trained with init_lora_weights={start}, which changes the base weights; save it as plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    used = [name for name in NOT_PLAIN if adapter.get(name) not in (None, False, "none", [], {})]
    return f"uses {', '.join(used)}, and only plain LoRA can be a start" if used else ""


def _difference(lora: LoraSettings, adapter: dict[str, object]) -> str:
    """Return which settings of LoRA an adapter does not fit, and how to set them; empty if it fits."""
    rank, alpha = int(str(adapter.get("r"))), float(str(adapter.get("lora_alpha")))
    rslora, dora = bool(adapter.get("use_rslora")), bool(adapter.get("use_dora"))
    scale = alpha / (rank**0.5 if rslora else rank)
    wanted = adapter_settings(adapter)
    there, here, keys = list[str](), list[str](), list[str]()
    if rank != lora.rank:
        there, here, keys = [f"rank {rank}"], [f"rank {lora.rank}"], ["model.lora.rank"]
    if not math.isclose(scale, lora.scale, rel_tol=1e-6):
        there, here = [*there, f"scale {scale:g}"], [*here, f"scale {lora.scale:g}"]
        keys += ["model.lora.alpha", "model.lora.alpha_ratio", "model.lora.rslora"]
    if dora != lora.dora:
        there, here, keys = [*there, f"DoRA {dora}"], [*here, f"DoRA {lora.dora}"], [*keys, "model.lora.dora"]
    targets = _targets(adapter)
    if targets and lora.targets != "all-linear" and {*targets} != {*lora.targets}:
        there, keys = [*there, f"targets {wanted['model.lora.targets']}"], [*keys, "model.lora.targets"]
        here = [*here, f"targets [{', '.join(sorted(lora.targets))}]"]
    if not there:
        return ""
    flags = {"model.lora.rslora": str(rslora).lower(), "model.lora.dora": str(dora).lower()}
    values = {"model.lora.alpha_ratio": "null", **flags, **wanted}
    now = {"model.lora.alpha_ratio": lora.alpha_ratio is None, "model.lora.rslora": lora.rslora == rslora}
    options = " ".join(f"--set {shlex.quote(f'{key}={values[key]}')}" for key in keys if not now.get(key, False))
    return f"has {', '.join(there)}, and the configuration {', '.join(here)}; use {options}"

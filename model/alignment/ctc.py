"""CTC models by Hugging Face id or folder, for forced alignment: their frame probabilities and their spelling.

Shapes: T frames, C tokens of the model.
"""

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import (
    MODEL_FOR_CTC_MAPPING,
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForCTC,
    AutoTokenizer,
    FeatureExtractionMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from data.corpus.audio import MIN_SAMPLES, waveform
from data.corpus.schema import SAMPLE_RATE
from data.errors import ConfigError, reason
from model.checkpoints.base_files import check_model
from model.checkpoints.fingerprint import file_digest

BLOCK_SECONDS, OVERLAP_SECONDS = 20, 2  # a recording is computed in blocks, with an overlap on both sides
_PROBES = 20_480, 184_320  # samples; their difference is a multiple of every usual frame
_FILES = {".safetensors", ".json", ".txt", ".model"}  # that determine the probabilities and the spelling


class CTCModel:
    """A CTC model with its feature extractor and its tokenizer."""

    def __init__(
        self, model: PreTrainedModel, extractor: FeatureExtractionMixin, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._model, self._extractor, self._tokenizer = model, extractor, tokenizer
        self.blank: int = model.config.pad_token_id  # as in the model's own loss
        self.size: int = model.config.vocab_size
        self._special = {self.blank, *tokenizer.all_special_ids}
        delimiter = getattr(tokenizer, "word_delimiter_token_id", None)
        self.delimiter: tuple[int, ...] = () if delimiter is None else (delimiter,)  # between words
        pieces = (piece for piece, token in tokenizer.get_vocab().items() if token not in {*self._special, delimiter})
        self._alphabet = {character for piece in pieces for character in piece}

    @functools.cached_property
    def frame(self) -> int:
        """Samples per frame; measured, since configurations name it in many ways or not at all."""
        short, long = (len(self._log_probs(np.zeros(n_samples, np.int16))) for n_samples in _PROBES)
        return (_PROBES[1] - _PROBES[0]) // (long - short)

    def log_probs(self, pcm: np.ndarray) -> Tensor:
        """Return log-probabilities [T, C], float32 on the CPU, of a recording, int16 [n_samples].

        Blocks are computed one after another, so that an hour takes hardly more memory than a minute.
        """
        n_frames = len(pcm) // self.frame
        block, overlap = (seconds * SAMPLE_RATE // self.frame for seconds in (BLOCK_SECONDS, OVERLAP_SECONDS))
        parts = [torch.zeros(0, self.size)]
        for first in range(0, n_frames, block):
            before = max(0, first - overlap)
            part_TC = self._log_probs(pcm[before * self.frame : (first + block + overlap) * self.frame])
            parts.append(part_TC[first - before :][: min(block, n_frames - first)])
        return torch.cat(parts)

    @torch.inference_mode()
    def _log_probs(self, pcm: np.ndarray) -> Tensor:
        wave = waveform(np.pad(pcm, (0, max(0, MIN_SAMPLES - len(pcm)))))  # the convolutions need a few frames
        inputs = self._extractor(wave, sampling_rate=SAMPLE_RATE, return_tensors="pt").to(self._model.device)
        return F.log_softmax(self._model(**inputs).logits[0].float(), dim=-1).cpu()

    def spell(self, word: str) -> tuple[int, ...]:
        """Return the tokens of a word, in the case of the model's tokens, without characters that the model lacks."""
        spelled = ""
        for character in word:
            forms = (character, character.upper(), character.lower())
            spelled += next((form for form in forms if form in self._alphabet), "")
        tokens = self._tokenizer(spelled, add_special_tokens=False)["input_ids"] if spelled else []
        return tuple(token for token in tokens if token not in self._special)


@functools.lru_cache(maxsize=1)
def load_ctc(path: str) -> CTCModel:
    """Load a CTC model once per process, on the GPU if there is one.

    Args:
        path: Hugging Face id or local folder; weights are read from safetensors only.

    Raises:
        ConfigError: nothing can be loaded from there, it is no CTC model, or weights are missing, which would be
            random.
    """
    _config(path)
    with _loading(path), torch.random.fork_rng(devices=[]):  # a new model draws random weights
        extractor = AutoFeatureExtractor.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, report = AutoModelForCTC.from_pretrained(
            path,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    missing = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    missing = {name for name in missing if not name.endswith("masked_spec_embed")}  # only training uses it
    if missing:
        raise ConfigError(
            f"align.model: {path} lacks {len(missing)} of the model's tensors ({min(missing)}, ...); use a checkpoint "
            "that was trained with CTC"
        )
    return CTCModel(model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), extractor, tokenizer)


def identity(path: str) -> str:
    """Return what identifies a model and its weights: the digest of a folder's files, or the commit of an id.

    Raises:
        ConfigError: a file is missing or damaged, or the configuration is not that of a CTC model.
    """
    _config(path)
    check_model("align.model", path, "ctc")  # before hours of audio are read
    if not Path(path).is_dir():
        with _loading(path):
            return f"{path}@{Path(str(try_to_load_from_cache(path, 'config.json'))).parent.name}"
    content = hashlib.sha256()
    for file in sorted(Path(path).iterdir()):
        if file.suffix in _FILES:
            content.update(f"{file.name} {file_digest(file)} ".encode())
    return content.hexdigest()


def _config(path: str) -> PretrainedConfig:
    with _loading(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CTC_MAPPING:
        raise ConfigError(f"align.model: {path} is a {config.model_type} model, which has no CTC; use e.g. wav2vec2")
    if config.pad_token_id is None:
        raise ConfigError(f"align.model: {path} does not say which token is the blank; set pad_token_id in config.json")
    return config


@contextmanager
def _loading(path: str) -> Iterator[None]:
    """Report any failure as a ConfigError: transformers, safetensors and the hub raise errors of many types."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"align.model: cannot load a CTC model from {path}: {reason(error)}") from None

"""Pre-train the demo's tiny models in seconds and save them as Hugging Face folders, which load like published ones.

Neither model sees a label next to an utterance: the encoder learns to recognise words and pitch, and the language model
learns to find key words.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.utils import logging

from data.corpus import synthetic
from data.corpus.schema import SAMPLE_RATE

WINDOW_SECONDS = 1  # window of the encoder, padded with silence; no synthetic clip is longer
FRAMES = WINDOW_SECONDS * 50
HOP = SAMPLE_RATE // 50  # samples per encoder frame
PITCH_BINS = 8
IGNORE = -100  # target of positions that cross_entropy skips

# Common English words that get one token each, like the words of the corpus; bytes cover all other words.
COMMON = """the of and a to in is you that it he was for on are as with his they I at be this have from or one had by
word but not what all were we when your can said there use an each which she do how their if will up other about out
many then them these so some her would make like him into time has look two more write go see number no way could people
my than first been call who its now find long down day did get come made may part over new sound take only little work
know place year live me back give most very after thing our just name good sentence man think say great where help
through much before line right too mean old any same tell boy follow came want show also around form three small
feel today week talk need well"""
STRUCTURE = ("client", "therapist", "label", "word")  # words at the start of a line


def make_encoder(folder: Path) -> None:
    """Save a Whisper encoder, 2 layers of width 64, pre-trained to name word, pitch and tone of every frame."""
    with fixed_seed(seed=1):
        extractor = WhisperFeatureExtractor(feature_size=64, chunk_length=WINDOW_SECONDS)
        model = WhisperModel(tiny_whisper_config(width=64, layers=2, mels=64))
        _pretrain_encoder(model, extractor)
    _save(model, folder)
    extractor.save_pretrained(folder)


def make_llm(folder: Path) -> None:
    """Save a Llama, 3 layers of width 96, pre-trained as a language model on dialogues that end in a key word."""
    tokenizer = tiny_tokenizer()
    with fixed_seed(seed=2):
        model = tiny_llama(tokenizer, width=96, layers=3)
        _pretrain_llm(model, tokenizer)
    _save(model, folder)
    tokenizer.save_pretrained(folder)


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Save a model without a progress bar."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.eval().save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def tiny_llama(tokenizer: PreTrainedTokenizerFast, *, width: int, layers: int) -> LlamaForCausalLM:
    """Return an untrained Llama for a tokenizer."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=256,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            initializer_range=0.06,
            **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
        )
    )


def tiny_whisper_config(*, width: int, layers: int, mels: int) -> WhisperConfig:
    """Return the configuration of a Whisper whose decoder is as small as possible, because it is never called."""
    return WhisperConfig(
        d_model=width,
        num_mel_bins=mels,
        encoder_layers=layers,
        encoder_attention_heads=4,
        encoder_ffn_dim=2 * width,
        max_source_positions=FRAMES,
        decoder_layers=1,
        decoder_attention_heads=1,
        decoder_ffn_dim=1,
        max_target_positions=1,
        vocab_size=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
    )


def _pretrain_encoder(model: WhisperModel, extractor: WhisperFeatureExtractor, *, clips: int = 600) -> list[float]:
    """Minimise the sum of frame-wise cross-entropies of word, pitch bin and tone. Return the losses."""
    mels, targets = _frames(extractor, clips)
    sizes = [len(synthetic.WORDS), PITCH_BINS, 2]
    head = nn.Linear(model.config.d_model, sum(sizes))

    def loss() -> Tensor:
        rows = torch.randint(clips, (8,))
        logits = head(model.encoder(mels[rows]).last_hidden_state).flatten(0, 1).split(sizes, dim=-1)
        goals = targets[rows].flatten(0, 1).unbind(-1)
        parts = [F.cross_entropy(logit, goal, ignore_index=IGNORE) for logit, goal in zip(logits, goals, strict=True)]
        return torch.stack(parts).sum()

    return optimise([*model.encoder.parameters(), *head.parameters()], loss, steps=300)


def _frames(extractor: WhisperFeatureExtractor, count: int) -> tuple[Tensor, Tensor]:
    """Return log-mels [count, mels, 2 * FRAMES] and the word, pitch bin and tone of each frame [count, FRAMES, 3]."""
    audio, targets = [], torch.full((count, FRAMES, 3), IGNORE)
    for row, clip in enumerate(synthetic.clips(count, seed=0)):
        audio.append(clip.audio.astype(np.float32) / 32768)
        frames = min(FRAMES, len(clip.audio) // HOP)
        middle = np.arange(frames) * HOP + HOP // 2
        pitch = np.clip(np.log2(clip.f0[middle] / 75) * 5, 0, PITCH_BINS - 1).astype(np.int64)
        columns = clip.words_at[middle], pitch, np.full(frames, clip.rise)
        targets[row, :frames] = torch.from_numpy(np.stack(columns, axis=1))
    return extractor(audio, sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_features"], targets


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with one token for every listed word with its leading space."""
    prompt_words = {word for prompt in synthetic.PROMPTS for word in prompt.split()}
    words = sorted({*synthetic.WORDS, *synthetic.LABELS, *prompt_words, *COMMON.split()})
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,  # never reached: merging ends when every word is one token
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([*STRUCTURE, *(f" {word}" for word in words)], trainer)
    # Every document of the pre-training starts with BOS, so the tokenizer says that a text does.
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _pretrain_llm(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[float]:
    """Minimise the next-token loss over whole documents. Return the losses."""
    rng = np.random.default_rng(2)

    def loss() -> Tensor:
        documents = [tokenizer(_document(rng), add_special_tokens=False)["input_ids"] for _ in range(16)]
        rows = [[token for piece in document for token in piece] for document in documents]
        ids_BT = nn.utils.rnn.pad_sequence(
            [torch.tensor([tokenizer.bos_token_id, *row, tokenizer.eos_token_id]) for row in rows],
            batch_first=True,
            padding_value=tokenizer.pad_token_id,
        )
        targets_BT = ids_BT.masked_fill(ids_BT == tokenizer.pad_token_id, IGNORE)
        return model(input_ids=ids_BT, labels=targets_BT, use_cache=False).loss  # type: ignore[no-any-return]

    return optimise(list(model.parameters()), loss, steps=200)


def _document(rng: np.random.Generator) -> list[str]:
    """Return the pieces of a document, which are tokenised one by one: a dialogue and the key word of its last turn.

    Labels occur in separate documents, so the model knows "label:" and the label words, but not after a turn.
    """
    if rng.random() < 0.1:
        return ["label:", f" {rng.choice(synthetic.LABELS)}"]
    before = [f"therapist: {rng.choice(synthetic.PROMPTS)}\n"] if rng.random() < 0.5 else []
    words = synthetic.utterance(rng).words
    key = next(word for word in words if word not in synthetic.FILLERS)
    return [*before, "client:", f" {' '.join(words)}", "\nword:", f" {key}"]


def optimise(parameters: list[nn.Parameter], loss: Callable[[], Tensor], *, steps: int) -> list[float]:
    """Minimise a loss that draws a batch in each call. Return its values."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    values = []
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        values.append(value.item())
    return values


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Make a block reproducible by a seed and one thread (sums in one order). Keep the caller's random state."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)

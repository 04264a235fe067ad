"""Sessions of synthetic speech with known times, and a CTC model that is trained on such speech."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, SeamlessM4TFeatureExtractor, Wav2Vec2BertConfig, Wav2Vec2BertForCTC

from data.corpus import synthetic
from data.corpus.audio import waveform
from data.corpus.schema import SAMPLE_RATE, Turn
from model.tiny import fixed_seed, optimise

SECONDS = 3  # of a training clip
HOP = 320  # samples a frame
BLANK = 0
OKAY = synthetic.Utterance(("okay",), "neutral", ambiguous=False, rise=True)
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "feature_projection_input_dim": 80,
    "conv_depthwise_kernel_size": 7,
    "position_embeddings_type": None,
    "apply_spec_augment": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "conformer_conv_dropout": 0.0,
    "pad_token_id": BLANK,
}


def pause(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Return the hiss of a room without speech, int16."""
    return np.round(rng.standard_normal(round(seconds * SAMPLE_RATE)) * 60).astype(np.int16)


def speech(
    rng: np.random.Generator, voice: synthetic.Voice, utterance: synthetic.Utterance | None = None
) -> tuple[str, synthetic.Clip]:
    """Speak three to five words, or an utterance."""
    utterance = utterance or synthetic.utterance(rng)
    return " ".join(utterance.words), synthetic.speak(utterance, voice, rng)


def session(seed: int, n_turns: int) -> tuple[np.ndarray, list[Turn], np.ndarray]:
    """Return a session of two speakers in turn, with a pause after each turn; every third turn is "okay".

    Returns:
        The recording (int16), the turns with a start in whole seconds and the next one's as their end, as AnnoMI has
        them, and the true times (n_turns, 2) in s.
    """
    rng = np.random.default_rng(seed)
    voices = [synthetic._voice(rng) for _ in range(2)]
    pieces, turns, truth, clock = [pause(rng, 1.3)], [], [], 1.3
    for index in range(n_turns):
        text, clip = speech(rng, voices[index % 2], OKAY if index % 3 == 1 else None)
        truth.append((clock, clock + len(clip.audio) / SAMPLE_RATE))
        turns.append(Turn(f"s/{index}", index, ("therapist", "client")[index % 2], text, start=float(int(clock))))
        pieces += [clip.audio, pause(rng, rng.uniform(0.1, 0.8))]
        clock += (len(pieces[-2]) + len(pieces[-1])) / SAMPLE_RATE
    for turn, later in pairwise(turns):
        turn.end = later.start
    return np.concatenate(pieces), turns, np.array(truth)


def make_ctc(folder: Path) -> None:
    """Save a small w2v-BERT with a token for each word.

    With CTC alone it names a word in one frame, mostly the last one. Cross-entropy of every frame makes it name the
    word as long as it lasts, as models with characters do.
    """
    extractor, tokenizer = SeamlessM4TFeatureExtractor(feature_size=40, num_mel_bins=40), word_tokenizer()
    features, frames, targets = clips(extractor, tokenizer, count=300)
    with fixed_seed(seed=11):
        model = Wav2Vec2BertForCTC(Wav2Vec2BertConfig(vocab_size=len(tokenizer), **SMALL))

        def loss() -> torch.Tensor:
            rows = torch.randint(len(features), (8,))
            log_probs = F.log_softmax(model(input_features=features[rows]).logits, dim=-1)
            words = [targets[row] for row in rows]
            lengths = torch.tensor([len(word) for word in words])
            heard = torch.full((len(rows),), log_probs.shape[1])
            ctc = F.ctc_loss(log_probs.transpose(0, 1), torch.cat(words), heard, lengths, blank=BLANK)
            return ctc + F.nll_loss(log_probs.flatten(0, 1), frames[rows].flatten())

        optimise(list(model.parameters()), loss, steps=250)
    for part in (model.eval(), extractor, tokenizer):
        part.save_pretrained(folder)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each word of the synthetic corpus."""
    words = ("<pad>", "<unk>", *synthetic.WORDS)
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")


def clips(extractor, tokenizer, count: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return clips of two utterances and pauses: features, the token of every frame, and the tokens of the words."""
    rng = np.random.default_rng(12)
    waves, frames, targets = [], [], []
    for _ in range(count):
        texts, spoken = zip(*(speech(rng, synthetic._voice(rng)) for _ in range(2)), strict=True)
        room = SECONDS - sum(len(clip.audio) for clip in spoken) / SAMPLE_RATE
        gaps = [pause(rng, gap) for gap in rng.dirichlet((1, 1, 1)) * room + (0, 0, 1)]
        wave = np.concatenate([gaps[0], spoken[0].audio, gaps[1], spoken[1].audio, gaps[2]])
        silent = [np.full(len(gap), BLANK) for gap in gaps]
        first = len(tokenizer) - len(synthetic.WORDS)
        token = np.concatenate(
            [silent[0], spoken[0].words_at + first, silent[1], spoken[1].words_at + first, silent[2]]
        )
        waves.append(waveform(wave[: SECONDS * SAMPLE_RATE]))
        frames.append(token[HOP // 2 : SECONDS * SAMPLE_RATE : HOP])
        targets.append(torch.tensor(tokenizer(" ".join(texts))["input_ids"]))
    features = extractor(waves, sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_features"]
    return features, torch.from_numpy(np.stack(frames))[:, : features.shape[1]], targets

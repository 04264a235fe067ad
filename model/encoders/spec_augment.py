"""Time masks of SpecAugment."""

import numpy as np


def time_mask(n_frames: int, share: float, rng: np.random.Generator, span: int = 10) -> np.ndarray:
    """Draw the frames of one clip that SpecAugment hides: spans that may overlap, as in wav2vec 2.0 (2006.11477).

    Args:
        n_frames: of the clip.
        share: of the frames, in expectation and if no spans overlapped.
        rng: seeded by the utterance, so that the mask does not depend on the batch.
        span: frames hidden in a row; at most half of the clip.

    Returns:
        bool [n_frames], True where hidden; never all of them.
    """
    hidden = np.zeros(n_frames, dtype=bool)
    span = min(span, n_frames // 2)
    if span == 0:
        return hidden
    starts = n_frames - span + 1
    count = int(share * n_frames / span + rng.random())
    for start in rng.choice(starts, min(count, starts), replace=False):
        hidden[start : start + span] = True
    if hidden.all():
        hidden[rng.integers(n_frames)] = False
    return hidden

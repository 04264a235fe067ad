"""Time masks of SpecAugment (Park et al., 2019, arXiv 1904.08779), drawn as in wav2vec 2.0 (arXiv 2006.11477)."""

import numpy as np


def draw_time_mask(n_frames: int, share: float, rng: np.random.Generator, span: int = 10) -> np.ndarray:
    """Draw the frames of one clip that are hidden, as spans that may overlap.

    Args:
        n_frames: length of the clip in frames.
        share: expected share of hidden frames, if no spans overlapped.
        rng: seeded by the utterance, so that the mask does not depend on the batch.
        span: number of adjacent frames that are hidden together; at most half of the clip is used.

    Returns:
        A bool array of `n_frames`, True where a frame is hidden. It never hides all frames.
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

"""Out of memory: what is recognised as that, and how it ends where nothing smaller can be computed."""

import contextlib
import gc
from collections.abc import Iterator

import torch

from data.errors import UserError

SIGNS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
ADVICE = "lower data.history or model.llm.max_text_tokens, set model.llm.gradient_checkpointing, or use a larger device"


class OutOfMemory(UserError):  # noqa: N818 — that is what everybody calls it
    """A trial needs more memory than its device has, however little is computed at once."""

    reason = "out of memory"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not get memory: on a GPU there is a class for it, on a CPU words alone."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS)


def one_at_a_time(tokens: int) -> OutOfMemory:
    """The error where an example does not fit by itself."""
    return OutOfMemory(f"out of memory with one example at a time ({tokens} tokens); {ADVICE}")


def free() -> None:
    """Give back what nothing refers to any more. To be called outside of the `except` that holds the frames."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Tell that there is no memory for something that no token budget makes smaller.

    Raises:
        OutOfMemory: in place of torch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory in {what}; train fewer parameters, or use a larger device") from None

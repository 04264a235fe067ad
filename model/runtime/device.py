"""Move values from the host to the device without waiting for the device."""

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data.loading.batching import PAD_TOLERANCE
from data.loading.examples import Example
from data.loading.sources import Batch
from data.loading.teacher_files import TeacherLogits

UPLOADS = 2  # batches that are copied to a GPU ahead of the one that is computed
GPU_PAD_TOLERANCE = 2048


def pad_tolerance(device: torch.device) -> int:
    """Return how many padded positions cost less than one more pass over the model, see `data.loading.batching`.

    A GPU receives the kernels of a pass one by one, some 10 us each, however little they compute: for 28 layers with
    LoRA that takes as long as an H100 needs for 2,000 to 3,000 positions.
    """
    return GPU_PAD_TOLERANCE if device.type == "cuda" else PAD_TOLERANCE


def on_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return values (a number, nested lists, an array, or a tensor) as a tensor on the device.

    The copy starts from pinned memory, which torch keeps until the copy is done: a copy from pageable memory first
    waits until the device has finished everything that was queued.
    """
    tensor = values.to(dtype) if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def uploaded(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches whose cached features and logits are on the device; on a GPU they are copied UPLOADS batches ahead.

    The copies run on a stream of their own, beside the kernels of the steps before. On a CPU nothing changes.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream, waiting = torch.cuda.Stream(device), deque[tuple[Batch, torch.cuda.Event]]()

    def upload(batch: Batch) -> None:
        with torch.cuda.stream(stream):
            copied = [_upload(example, device) for example in batch]
            waiting.append((copied, stream.record_event()))

    for batch in itertools.islice(batches, UPLOADS):
        upload(batch)
    while waiting:
        if (following := next(batches, None)) is not None:
            upload(following)
        batch, event = waiting.popleft()
        current = torch.cuda.current_stream(device)
        current.wait_event(event)
        for example in batch:
            for tensor in (*(example.features or ()), *(example.teacher_logits or ())):
                assert isinstance(tensor, Tensor)
                tensor.record_stream(current)  # its memory is not used again before the step has read it
        yield batch


def _upload(example: Example, device: torch.device) -> Example:
    features, logits = example.features, example.teacher_logits
    return replace(
        example,
        features=None if features is None else tuple(on_device(values, device) for values in features),
        teacher_logits=None if logits is None else TeacherLogits(*(on_device(values, device) for values in logits)),
    )

"""What depends on the device alone."""

import torch

from data.loading.batching import PAD_TOLERANCE, Cost, micro_batches
from model.runtime.device import spared


def test_a_gpu_computes_a_ragged_step_in_few_parts() -> None:
    costs = [Cost(100 + 25 * place) for place in range(16)]
    parts = {kind: len(micro_batches(costs, 16_384, spared(torch.device(kind)))) for kind in ("cpu", "cuda")}
    assert spared(torch.device("cpu")) == PAD_TOLERANCE
    assert parts["cuda"] == 2
    assert parts["cpu"] > 6

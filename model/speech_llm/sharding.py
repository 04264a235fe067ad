"""Sharding: the workers of a trial divide the frozen weights of the LLM's layers among them (FSDP2, `fully_shard`).

Before a layer computes, forward or backward, its weights are gathered from all workers, and afterwards they are freed.
What trains is whole on each worker, as without sharding. So gradients are summed, and checkpoints written and read, in
the same way by any number of workers. Embeddings, LM head, encoder and adapter are whole, too.

Workers have different micro-batches, batches of an evaluation and lengths of replies, and all must gather a layer at
the same time. So each tells the others before it runs the LLM, and one that has nothing left to compute runs it on a
single token until all are done (`Sharding.keep_pace`).
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from data.errors import ConfigError
from model.runtime.distributed import any_worker
from model.speech_llm.language_model import llm_layers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Inputs = dict[str, Tensor]


def device_mesh(device: str) -> "DeviceMesh":
    """Return all workers of the trial; the first call for a device is one that all of them must make together."""
    return _device_mesh(device, dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _device_mesh(device: str, workers: dist.ProcessGroup) -> "DeviceMesh":
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device, (workers.size(),))


class Sharding:
    """The division of an LLM among the workers; see the module.

    Args:
        llm: whose frozen layers are divided. Its weights may be on the CPU: each worker moves its part to the device.
        device: "cpu" or "cuda".

    Raises:
        ConfigError: the LLM has no layers that can be divided.
    """

    def __init__(self, llm: PreTrainedModel, device: str) -> None:
        from torch.distributed.fsdp import fully_shard

        self.llm = llm
        self.idle = False
        layers = llm_layers(llm)
        if not layers:
            raise ConfigError(
                f"resources.shard: true needs an LLM with layers that transformers can recompute, and a "
                f"{llm.config.model_type} model has none; set resources.shard=false"
            )
        trained = {parameter for parameter in llm.parameters() if parameter.requires_grad}
        mesh = device_mesh(device)
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained & {*layer.parameters()})
        for parameter in llm.parameters():  # what stays whole would keep the LLM's file in memory, which is mapped
            if not hasattr(parameter, "to_local"):
                parameter.data = parameter.data.clone()
        # Both `forward` and `generate` of LoRA's wrapper call the model inside.
        inner = llm.get_base_model() if hasattr(llm, "get_base_model") else llm
        inner.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def _before_forward(
        self, module: nn.Module, positional: tuple[Tensor, ...], inputs: Inputs
    ) -> tuple[tuple[Tensor, ...], Inputs]:
        if not self.idle:
            any_worker(True)
        embeddings = inputs.get("inputs_embeds")
        # Layers below the lowest one that trains have no backward pass if their input needs none, as without audio.
        if torch.is_grad_enabled() and embeddings is not None and not embeddings.requires_grad:
            inputs = inputs | {"inputs_embeds": embeddings.detach().requires_grad_()}
        return positional, inputs

    @contextmanager
    def keep_pace(self, embed: Callable[[list[int]], Tensor]) -> Iterator[None]:
        """Run the LLM for the other workers after the block, until all have left it.

        With gradients enabled, each of its passes must be followed by its backward pass, as in training.

        Args:
            embed: returns the embeddings [T, E] of tokens.
        """
        yield
        while any_worker(False)[0]:
            self.idle = True
            logits = self.llm(inputs_embeds=embed([0])[None], use_cache=False).logits
            if logits.requires_grad:
                (0 * logits.sum()).backward()
            self.idle = False

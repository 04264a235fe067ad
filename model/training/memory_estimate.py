"""The memory of a training step, estimated without making it, where neither the weights nor the device is at hand.

Weights are counted by their shapes. For activations, the LLM computes a step over tensors without values (torch's fake
tensors), and the storage of each is counted from the operation that makes it until it is dropped. Kernels of attention
that keep no scores are assumed, as those of GPUs in half precision and of CPUs do. Activations of an encoder are left
out: they exist only if it trains. So are the context of a GPU, and what its allocator cannot use.

Legend: R positions of a row, E width of the LLM, Q heads, D width of a head.
"""

import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from model.compat import fake_tensors, storage_key
from model.config import LoadIn, ModelConfig
from model.objectives.losses import student_outputs
from model.speech_llm.language_model import llm_layers
from model.speech_llm.prompt import Answer

ESTIMATED = "estimated"  # in transformers' registry of attention
# Bytes of a weight. NF4: half a byte, a byte for the scale of 64 weights, and 4 for the scale of 256 scales.
QUANTIZED: Mapping[LoadIn, float] = {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}
MOMENTS = 2  # of AdamW, for each weight that trains
PREDICTED = 4  # tokens of an answer
FEW = 2  # layers of which a step is computed
GATHERED_LAYERS = 2  # the layer that is computed, and the next one, which is being gathered


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a worker at the peak of a step."""

    frozen: int  # weights that do not train
    trained: int  # weights that train, and their moments
    converted: int  # weights of what is computed, beside the stored ones: gathered from workers, or not quantized
    step: int = 0  # activations and gradients

    @property
    def total(self) -> int:
        """The sum."""
        return self.frozen + self.trained + self.step + self.converted


def estimate_memory(
    model: nn.Module, llm: PreTrainedModel, config: ModelConfig, lengths: Sequence[int], workers: int = 1
) -> MemoryEstimate:
    """Return the memory of a step over sequences that are computed at once.

    Args:
        model: a SpeechLLM or an LLM with LoRA, on the device "meta".
        llm: its LLM.
        config: of the model.
        lengths: of the sequences, in positions; they are laid in one row.
        workers: that divide the LLM's layers.
    """
    stored = weight_memory(model, llm, config.llm.load_in, workers)
    return replace(stored, step=step_memory(llm, config, lengths))


def weight_memory(model: nn.Module, llm: PreTrainedModel, load_in: LoadIn, workers: int = 1) -> MemoryEstimate:
    """Return the same without that of a step; see `estimate_memory`."""
    linear = {id(layer.weight) for layer in _stored_layers(llm)}
    layers = llm_layers(llm)
    divided = {id(weight) for layer in layers for weight in layer.parameters() if not weight.requires_grad}
    quantized = QUANTIZED.get(load_in)
    frozen = trained = 0.0
    for weight in model.parameters():
        if weight.requires_grad:
            trained += (1 + MOMENTS) * weight.nbytes
        elif quantized is not None and id(weight) in linear:
            frozen += quantized * weight.numel()
        else:
            frozen += weight.nbytes / (workers if id(weight) in divided else 1)
    converted = 0
    if quantized is not None:
        converted = max(layer.weight.nbytes for layer in _stored_layers(llm))
    elif workers > 1:
        sizes = [sum(weight.nbytes for weight in layer.parameters() if id(weight) in divided) for layer in layers]
        converted = GATHERED_LAYERS * max(sizes)
    return MemoryEstimate(frozen=round(frozen), trained=round(trained), converted=converted)


def _stored_layers(llm: PreTrainedModel) -> list[nn.Linear]:
    """Return the linear layers whose weights `model.llm.load_in` quantizes."""
    head = llm.get_output_embeddings()
    return [
        module
        for name, module in llm.named_modules()
        if isinstance(module, nn.Linear) and module is not head and "lora_" not in name
    ]


def step_memory(llm: PreTrainedModel, config: ModelConfig, lengths: Sequence[int]) -> int:
    """Return the bytes that a step adds at its peak: activations, and the gradients of what trains.

    The layers of an LLM are alike, apart from whether they are recomputed. So a step over few of them is computed, and
    what one more adds.
    """
    layers = llm_layers(llm)
    kinds = [[layer for layer in layers if layer.gradient_checkpointing is flag] for flag in (True, False)]

    def of(*counts: int) -> int:
        """Return the bytes with so many layers of each kind, the recomputed ones first, as in the LLM."""
        some = [layer for kind, count in zip(kinds, counts, strict=True) for layer in kind[:count]]
        return _step_memory(llm, config, some, lengths)

    few = [min(FEW, len(kind)) for kind in kinds]
    total = bytes_of_few = of(*few)
    for index, kind in enumerate(kinds):
        if len(kind) > FEW:
            more = [count + (at == index) for at, count in enumerate(few)]
            total += (len(kind) - FEW) * (of(*more) - bytes_of_few)
    return total


def _step_memory(llm: PreTrainedModel, config: ModelConfig, layers: Sequence[nn.Module], lengths: Sequence[int]) -> int:
    """Return the same for an LLM with these layers alone."""
    with fake_tensors():
        fake = _without_values(llm, layers)
        embedding = fake.get_input_embeddings().weight
        row = torch.empty(sum(lengths), embedding.shape[1], dtype=embedding.dtype, requires_grad=True)
        predicted = Answer((0,) * (PREDICTED * len(lengths)), (0,) * (PREDICTED * len(lengths)))
        live = LiveBytes([*fake.parameters(), *fake.buffers(), row])
        with live, torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
            loss = student_outputs(fake, [row], [predicted], hidden=False).logits_PV.logsumexp(-1).sum()
        with live:
            loss.backward()
    return live.peak


def _without_values(llm: PreTrainedModel, layers: Sequence[nn.Module]) -> PreTrainedModel:
    """Return a copy of an LLM with some of its layers, and fake tensors in place of its own, in training mode."""
    left_out = {
        id(tensor)
        for layer in llm_layers(llm)
        if layer not in layers
        for tensor in (*layer.parameters(), *layer.buffers())
    }
    memo: dict[int, object] = {
        id(tensor): (
            nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype), requires_grad=tensor.requires_grad)
            if isinstance(tensor, nn.Parameter)
            else torch.empty(tensor.shape, dtype=tensor.dtype)
        )
        for tensor in (*llm.parameters(), *llm.buffers())
        if id(tensor) not in left_out
    }
    for module in llm.modules():
        if isinstance(module, nn.ModuleList) and set(layers) & set(module):
            memo[id(module)] = nn.ModuleList([copy.deepcopy(layer, memo) for layer in layers])
    fake: PreTrainedModel = copy.deepcopy(llm, memo)
    fake.set_attn_implementation(ESTIMATED)
    return fake.train()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, while they are live.

    Args:
        existing: tensors that do not count.
    """

    def __init__(self, existing: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {storage_key(tensor.untyped_storage()): 0 for tensor in existing}

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Compute an operation, and count what it has made."""
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if (key := storage_key(storage)) not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class _Attention(torch.autograd.Function):
    """Takes the memory of a kernel of attention that keeps no scores (arXiv 2205.14135), and computes nothing."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *heads: Tensor) -> Tensor:
        """Keep what the backward pass needs: all inputs, the outputs, and the normaliser of each row of scores."""
        query = heads[0]
        outputs = query.transpose(1, 2).contiguous().transpose(1, 2)  # in the layout of the next product
        ctx.save_for_backward(*heads, outputs, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return outputs

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of queries, keys and values."""
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))  # type: ignore[attr-defined]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: object
) -> tuple[Tensor, None]:
    mixed = torch.is_autocast_enabled("cpu")  # then PyTorch casts what its kernels read, and keep
    dtype = torch.get_autocast_dtype("cpu") if mixed else query.dtype
    outputs: Tensor = _Attention.apply(query.to(dtype), key.to(dtype), value.to(dtype))
    return outputs.transpose(1, 2).contiguous(), None


AttentionInterface.register(ESTIMATED, _attention)
AttentionMaskInterface.register(ESTIMATED, sdpa_mask)

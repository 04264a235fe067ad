"""Private APIs of dependencies that `model` needs, each with the version it was checked against.

tests/model/test_compat.py fails when one of them disappears.
"""

import functools
import gc
import importlib
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

Marked = TypeVar("Marked", bound=Callable[..., object])
ADAPTER = "default"  # PEFT's name of a model's only adapter, which its files leave out


class FeatureEncoder(Protocol):
    """The convolutions of a wav2vec 2.0 model in transformers."""

    def _freeze_parameters(self) -> None: ...


def freeze_feature_encoder(module: FeatureEncoder) -> None:
    """Freeze the convolutions of a wav2vec 2.0 model and keep them out of the autograd graph (transformers 5.23).

    `requires_grad_(False)` alone would leave the graph: the module marks its input as requiring gradients in training.
    `freeze_feature_encoder` is public on models with a head, but missing on HubertModel.
    """
    module._freeze_parameters()


def lora_parameter_names(tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Return the tensors of PEFT's adapter_model.safetensors under the parameter names of a `PeftModel`.

    peft 0.21.2: `peft.utils.save_and_load._insert_adapter_name_into_state_dict`. The public
    `set_peft_model_state_dict` does the same, but only for a model that is loaded.
    """
    from peft.utils.save_and_load import _insert_adapter_name_into_state_dict

    # The files leave out `.weight` after DoRA's magnitudes.
    full = {f"{name}.weight" if name.endswith("lora_magnitude_vector") else name: x for name, x in tensors.items()}
    named: dict[str, Tensor] = _insert_adapter_name_into_state_dict(full, ADAPTER, "lora_")
    return named


def attention_of(llm: "PreTrainedModel") -> str:
    """Return the implementation of attention that an LLM uses, by its name in transformers' registry (5.23).

    `set_attn_implementation` is public, and nothing public reads what it sets.
    """
    name: str = llm.config._attn_implementation
    return name


def supports_flash_attention(llm: "PreTrainedModel") -> bool:
    """Return whether the family of an LLM can use the kernels of `flash_attn` (transformers 5.23)."""
    supported: bool = llm._supports_flash_attn
    return supported


@contextmanager
def no_search_for_packed_rows() -> Iterator[None]:
    """Let a model not look for packed rows in its positions: it would wait for the device (transformers 5.23).

    Rows that are packed here come with what makes them so; other batches have none.
    """
    from transformers import masking_utils

    search = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = search


# Settings of `torch._dynamo.config`.
COMPILER = {
    "force_parameter_static_shapes": False,
    "force_nn_module_property_static_shapes": False,
    "recompile_limit": 64,
}


def compile_for_any_size(function: Marked, backend: str) -> Marked:
    """Return a compiled function in which sizes are constants, except those that `mark_dynamic` names.

    torch 2.14.1: by default, sizes of parameters are constants in any case, and after eight variants of a function a
    ninth one is not compiled. Dropout draws what it draws without the compiler.
    """
    import torch

    config = importlib.import_module("torch._dynamo.config")
    for name, value in COMPILER.items():
        setattr(config, name, value)
    if backend == "inductor":
        return cast(Marked, torch.compile(function, backend=backend, options={"fallback_random": True}))
    return cast(Marked, torch.compile(function, backend=backend))


def mark_dynamic(tensor: "Tensor", *dimensions: int) -> None:
    """Let compiled code serve all sizes of some dimensions of a tensor, but for 1, which stays a constant."""
    mark = importlib.import_module("torch._dynamo").maybe_mark_dynamic
    for dimension in dimensions:
        if tensor.shape[dimension] != 1:
            mark(tensor, dimension)


def storage_key(storage: "torch.UntypedStorage") -> int:
    """Return what identifies a storage while it lives; fake tensors have no address (torch 2.14.1: `_cdata`)."""
    return cast(int, storage._cdata)


def fake_tensors() -> AbstractContextManager[object]:
    """Return a context in which tensors have shapes and no values (torch 2.14.1: `FakeTensorMode`)."""
    mode: AbstractContextManager[object] = importlib.import_module("torch._subclasses.fake_tensor").FakeTensorMode()
    return mode


def skip_steps_if(flag: "Tensor", optimizer: "torch.optim.Optimizer") -> None:
    """Let a fused optimizer skip its step on the device while `flag` (float, a scalar on the device) is not 0.

    torch 2.14.1: fused optimizers read `found_inf`, which `torch.amp.GradScaler` sets.
    """
    optimizer.found_inf = flag  # type: ignore[attr-defined]


def defer_imports() -> None:
    """Let importing transformers and peft load less: about 2 of 6 CPU-seconds in each process that computes.

    Checked against torch 2.14.1 and transformers 5.23.0. Call it before either is imported; it imports nothing itself,
    and does nothing about what is imported already. What is deferred is loaded when something uses it:

    - `torch._dynamo`, the compiler (with sympy, networkx and `torch.distributed.tensor`): transformers only marks
      functions for it, and optimizers ask it to leave them alone. A process without `torch.compile` never needs it.
    - `torch.distributed.tensor` and scipy's solver in transformers, which takes them for absent, as it does where torch
      was built without them: they serve tensor parallelism and losses of object detection.
    - bitsandbytes, where it is installed: PEFT would import it with its own quantized layers.
    - scipy and sklearn in nltk, of which ROUGE needs a stemmer: 2.9 of 3.5 CPU-seconds.
    - The list of all names in transformers, which it makes by reading 1,600 of its files, is made once, not twice.
    - The garbage collector pauses while large packages are imported: it would look through their objects again and
      again, and find nothing to collect.
    """
    if not any(isinstance(finder, DeferringFinder) for finder in sys.meta_path):
        if "torch._dynamo" not in sys.modules:
            DeferredDynamo.install()
        sys.meta_path.insert(0, DeferringFinder())


class DeferringFinder(MetaPathFinder):
    """Finds no module itself: it sees which one is imported next, and prepares for it."""

    # What is imported first once `transformers.utils` is complete.
    FIRST = ("transformers.models", "transformers.configuration_utils", "transformers.modeling_utils")

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a module that is executed within a context, or one of the compiler, once that is loaded; or None."""
        if name in self.FIRST:
            narrow_transformers()
        if name in AROUND:
            return around_execution(PathFinder.find_spec(name, path, target), AROUND[name])
        deferred = sys.modules.get("torch._dynamo")
        if not name.startswith("torch._dynamo.") or not isinstance(deferred, DeferredDynamo):
            return None
        real = deferred.load()
        if name in sys.modules:
            return spec_from_loader(name, LoadedModule(sys.modules[name]))
        return PathFinder.find_spec(name, list(real.__path__), target)


def around_execution(
    spec: ModuleSpec | None, around: Callable[[ModuleType], AbstractContextManager[None]]
) -> ModuleSpec | None:
    """Let a module be executed within a context, for which the method of its loader is replaced."""
    if spec is None or spec.loader is None:
        return spec
    execute = spec.loader.exec_module

    def exec_module(module: ModuleType) -> None:
        with around(module):
            execute(module)

    spec.loader.exec_module = exec_module  # type: ignore[method-assign]
    return spec


@contextmanager
def paused_collector(module: ModuleType) -> Iterator[None]:
    """Collect no garbage while a module is executed."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def no_sharded_weights(module: ModuleType) -> Iterator[None]:
    """Let PEFT not look whether weights are sharded, for which it would need `torch.distributed.tensor` (0.21.2)."""
    yield
    module._torch_supports_distributed = False  # type: ignore[attr-defined]


@contextmanager
def no_quantized_layers(module: ModuleType) -> Iterator[None]:
    """Let PEFT not import bitsandbytes for layers of its own, which are not used here (0.21.2)."""
    yield
    for name in ("is_bnb_available", "is_bnb_4bit_available"):
        setattr(module, name, absent)


class HidingFinder(MetaPathFinder):
    """Finds no module itself: it lets a thread's imports of packages fail, unless they are loaded."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages, self.thread = packages, threading.get_ident()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return None.

        Raises:
            ModuleNotFoundError: the module is hidden.
        """
        if name in self.packages and threading.get_ident() == self.thread:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def without(*packages: str) -> Callable[[ModuleType], AbstractContextManager[None]]:
    """Return a context that hides packages while a module is executed that continues without them."""

    @contextmanager
    def hidden(module: ModuleType) -> Iterator[None]:
        finder = HidingFinder(packages)
        sys.meta_path.insert(0, finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)

    return hidden


# Within which context a module is executed.
AROUND: dict[str, Callable[[ModuleType], AbstractContextManager[None]]] = {
    "torch": paused_collector,
    "transformers": paused_collector,
    "transformers.modeling_utils": paused_collector,
    "transformers.models": paused_collector,
    "peft": paused_collector,
    "nltk": without("scipy", "sklearn"),  # 3.10.4
    "peft.helpers": without("bitsandbytes"),  # 0.21.2
    "peft.import_utils": no_quantized_layers,
    "peft.tuners.tuners_utils": no_sharded_weights,
}


class LoadedModule(Loader):
    """Loads a module that is loaded already."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module."""
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """Restore what the import system has changed."""
        module.__spec__ = self.spec


class NothingCompiled:
    """Stands for `torch._dynamo.eval_frame`: accelerate looks whether a model that it saves is of its class."""

    class OptimizedModule:
        """What `torch.compile` returns; nothing is of this class before the compiler is loaded."""

    def __getattr__(self, name: str) -> object:
        return getattr(importlib.import_module("torch._dynamo.eval_frame"), name)


class DeferredDynamo(ModuleType):
    """Stands for `torch._dynamo` until something needs more than its marks on functions."""

    ITEMS = "torch._dynamo._trace_wrapped_higher_order_op"  # transformers.masking_utils takes a class from it

    def __init__(self) -> None:
        super().__init__("torch._dynamo")
        self.__path__: list[str] = []
        self.real: ModuleType | None = None
        self.marked: list[tuple[str, Callable[..., object]]] = []  # by which mark

    @classmethod
    def install(cls) -> None:
        """Take the compiler's place."""
        dynamo, items = cls(), ModuleType(cls.ITEMS)

        class TransformGetItemToIndex:
            """The compiler's class of this name, which is loaded with it."""

            def __new__(cls, *args: object) -> object:  # type: ignore[misc]
                dynamo.load()
                return importlib.import_module(DeferredDynamo.ITEMS).TransformGetItemToIndex(*args)

        items.TransformGetItemToIndex = TransformGetItemToIndex  # type: ignore[attr-defined]
        sys.modules[dynamo.__name__], sys.modules[cls.ITEMS] = dynamo, items

    def load(self) -> ModuleType:
        """Load the compiler, once, and mark what was to be marked."""
        if self.real is None:
            for name in (self.__name__, self.ITEMS):
                sys.modules.pop(name, None)
            state = random.getstate()  # which imports may draw from, and a trial must not notice them
            self.real = importlib.import_module(self.__name__)
            random.setstate(state)
            for mark, function in self.marked:
                getattr(self.real, mark)(function)
        return self.real

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # asked for by the import system
            raise AttributeError(name)
        if name == "eval_frame" and self.real is None:
            return NothingCompiled()
        return getattr(self.load(), name)

    def allow_in_graph(self, function: Marked) -> Marked:
        """Mark a function for the compiler."""
        return self.mark("allow_in_graph", function)

    def assume_constant_result(self, function: Marked) -> Marked:
        """Mark a function for the compiler."""
        return self.mark("assume_constant_result", function)

    def mark(self, mark: str, function: Marked) -> Marked:
        """Mark a function as soon as the compiler is loaded."""
        if self.real is None:
            self.marked.append((mark, function))
        else:
            getattr(self.real, mark)(function)
        return function

    def graph_break(self, *args: object) -> None:
        """End the graph that is traced, of which there is none before the compiler is loaded."""
        if self.real is not None:
            self.real.graph_break(*args)

    def disable(self, function: Callable[..., object] | None = None, *args: object, **options: object) -> object:
        """Return a function that the compiler, once it is loaded, leaves alone."""
        if function is None:
            return lambda decorated: self.disable(decorated, *args, **options)
        if self.real is not None or not callable(function) or isinstance(function, type):
            return self.load().disable(function, *args, **options)
        left_alone: Callable[..., object] | None = None

        @functools.wraps(function)
        def call(*arguments: object, **keywords: object) -> object:
            nonlocal left_alone
            if self.real is None:
                return function(*arguments, **keywords)
            left_alone = left_alone or self.real.disable(function, *args, **options)
            return left_alone(*arguments, **keywords)

        return call


def narrow_transformers() -> None:
    """Let transformers take for absent what no model here needs, and remember its list of names (transformers 5.23)."""
    from transformers import utils
    from transformers.utils import import_utils

    for name in ("is_torch_distributed_available", "is_scipy_available", "is_torch_flex_attn_available"):
        setattr(utils, name, absent)
        setattr(import_utils, name, absent)
    scan = import_utils.create_import_structure_from_path
    if scan.__name__ == "scan_folder":
        return

    def scan_folder(path: str | Path) -> object:
        """Return the names in a folder; the last result is remembered, by a `Path` of the folder, not of a file."""
        return scan(Path(path).parent if Path(path).is_file() else Path(path))

    import_utils.create_import_structure_from_path = scan_folder


def absent() -> bool:
    """Return that a library is not there."""
    return False

"""What each path from hidden states costs, counted with no GPU: `python -m bench.counts`.

The package runs on meta tensors, which have shapes and dtypes and no numbers. It takes its GPU's way with them; the two
row kernels are replaced by functions that say what the kernels read and write. A dispatch mode sees every operation:

    products    matrix products in units of 2 N V D flop, that of all rows with the head
    N x V       passes over the logits: elements of tensors [rows, words] read or written, over N V
    V x D       the same of the weight and its gradient; "a chunk" is what each chunk after the first adds
    launches    operations that write (views and empty tensors are free); a row kernel is one
    bytes       allocated in all; the most at a time; both beside the inputs
    waits       the operations that wait for the device

`standing_in` and `Counter` are what tests/kernels/test_counts.py counts with. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gem_kernels.backends.types import RowStats
from gem_kernels.linear import one_shot, products

META = torch.device("meta")
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "unique2", "_unique2"}
# They write without reading what was there.
OVERWRITES = {"copy_", "fill_", "zero_"}
FREE = {"empty", "empty_strided", "empty_like", "new_empty", "detach", "_pin_memory"}
PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2), "addmv": (1, 2), "mv": (0, 1), "bmm": (0, 1)}


class Waited(AssertionError):
    """The operation would wait for the device."""


@dataclass
class Counter(TorchDispatchMode):
    """Counts what runs under it. N rows, V words, D hidden units; `strict` raises Waited where something waits."""

    N: int
    V: int
    D: int
    strict: bool = False
    products: float = 0.0
    elements: dict[str, int] = field(default_factory=lambda: {"logits": 0, "hidden": 0, "weight": 0, "other": 0})
    fp32_weight: int = 0
    """Of `elements["weight"]`, those of float32 tensors that are no inputs."""
    launches: int = 0
    allocated: int = 0
    held: int = 0
    peak: int = 0
    waits: list[str] = field(default_factory=list)
    made: list[tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=list)
    """dtype and shape of every tensor that was allocated."""
    names: dict[str, int] = field(default_factory=dict)
    """The operations, with how often each was launched."""
    logits_strides: set[tuple[int, ...]] = field(default_factory=set)
    """Of the tensors that the row kernels were given."""

    def __post_init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.row_counts = {self.N}
        self.pinned: set[int] = set()

    def logits_passes(self) -> float:
        return self.elements["logits"] / (self.N * self.V)

    def weight_passes(self) -> float:
        return self.elements["weight"] / (self.V * self.D)

    def kind(self, x: Tensor) -> str:
        """Told by the length of what is contiguous in memory: D, or words."""
        sizes = sorted((stride, n) for stride, n in zip(x.stride(), x.shape) if n != 1)
        if len(sizes) < 2 or not x.numel():
            return "other"
        length = sizes[0][1]
        count = x.numel() // length
        if length == self.D:
            return "hidden" if count in self.row_counts else "weight"
        return "logits" if count in self.row_counts else "other"

    def touch(self, x: Tensor) -> None:
        kind = self.kind(x)
        self.elements[kind] += x.numel()
        if kind == "weight" and x.dtype == torch.float32:
            self.fp32_weight += x.numel()

    def row_kernel(self, *touched: Tensor) -> None:
        self.launches += 1
        self.logits_strides |= {x.stride() for x in touched}
        for x in touched:
            self.touch(x)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        given, written = self._arguments(function, args, kwargs)
        self._look_for_waits(name, [x for x, _ in given], kwargs)
        held = {x.untyped_storage()._cdata for x, _ in given}
        out = function(*args, **kwargs)
        fresh = [
            x for x in tree_leaves(out)
            if isinstance(x, Tensor) and x.device == META and x.untyped_storage()._cdata not in held
        ]  # fmt: skip
        for x in fresh:
            self._allocate(x)
        written = [x for x in written if x.device == META]
        if name in FREE or not (fresh or written):
            return out
        self.launches += 1
        self.names[name] = self.names.get(name, 0) + 1
        if name in PRODUCTS:
            left, right = (args[i] for i in PRODUCTS[name])
            if left.shape[-1] == self.D and right.stride(0) == 1:  # hidden states @ weight.T
                self.row_counts.add(left.shape[0])
            self.products += left.numel() * (right.shape[-1] if right.dim() > 1 else 1) / (self.N * self.V * self.D)
        for x in (*(x for x, read in given if read), *written, *fresh):
            self.touch(x)
        return out

    def _arguments(self, function, args, kwargs) -> tuple[list[tuple[Tensor, bool]], list[Tensor]]:
        """Tensors given, each with whether it is read; and those that are written."""
        given, written = [], []
        name = function.overloadpacket.__name__
        for i, argument in enumerate(function._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor)]
            writes = argument.alias_info is not None and argument.alias_info.is_write
            reads = not writes or (argument.name != "out" and name not in OVERWRITES)
            given += [(x, reads) for x in tensors]
            written += tensors if writes else []
        return given, written

    def _allocate(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        size = storage.nbytes()
        self.made.append((x.dtype, tuple(x.shape)))
        self.allocated += size
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.held -= size

    def _look_for_waits(self, name: str, given: list[Tensor], kwargs: dict) -> None:
        on_device = [x for x in given if x.device == META]
        found = bool(on_device) and name in WAITS
        if name.startswith("index") and any(x.dtype == torch.bool for x in on_device[1:]):  # x[mask]: a count
            found = True
        copied = None
        to = torch.device(kwargs.get("device") or META)
        if name == "_to_copy" and to == META:
            copied = given[0]
        elif name == "_to_copy" and on_device:
            found = True
        elif name == "copy_" and given[0].device == META:
            copied = given[1]
        if copied is not None and copied.device.type == "cpu" and copied.data_ptr() not in self.pinned:
            found = True
        if found:
            self.waited(name)

    def waited(self, name: str) -> None:
        self.waits.append(name)
        if self.strict:
            raise Waited(f"{name} waits for the device")


class FromData(TorchFunctionMode):
    """Dispatch modes do not see the copy in a factory that takes numbers."""

    FACTORIES = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in self.FACTORIES and out.device == META and not isinstance((*args, None)[-2], Tensor):
            counter = _counting()
            if counter is not None:
                counter.waited(function.__name__)
        return out


# The row kernels on meta tensors: what they read and write, and what their launchers allocate.


def _counting() -> Counter | None:
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return next((mode for mode in modes if isinstance(mode, Counter)), None)


def _rows_forward(rows: Tensor, targets: Tensor, options) -> RowStats:
    counter = _counting()
    if counter is not None:
        counter.row_counts.add(len(targets))
        counter.row_kernel(rows)
    return RowStats(*torch.empty(4, len(targets), dtype=torch.float32, device=rows.device).unbind())


def _rows_backward(grad: Tensor, rows: Tensor, targets: Tensor, options, vectors) -> None:
    counter = _counting()
    if counter is not None:
        counter.row_kernel(rows, grad)


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """Within, the linear functions run on meta tensors, and pinned memory is ordinary memory that a Counter knows."""

    def pin_memory(tensor: Tensor, *_) -> Tensor:
        counter = _counting()
        if counter is not None:
            counter.pinned.add(tensor.data_ptr())
        return tensor

    with contextlib.ExitStack() as patches:
        for module in (products, one_shot):
            patches.enter_context(mock.patch.object(module, "rows_forward", _rows_forward))
            patches.enter_context(mock.patch.object(module, "rows_backward", _rows_backward))
        patches.enter_context(mock.patch.object(Tensor, "pin_memory", pin_memory))
        patches.enter_context(FromData())
        yield

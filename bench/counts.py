"""What each path from hidden states costs, counted with no GPU: `python -m bench.counts`.

The package runs on meta tensors, which have shapes and dtypes and no numbers. It takes its GPU's way with them; the two
row kernels are replaced by functions that say what the kernels read and write. A dispatch mode sees every operation:

    products    matrix products in units of 2 N V D flop, that of all rows with the head
    N x V       passes over the logits: elements of tensors [rows, words] read or written, over N V
    V x D       the same of the weight and its gradient; "a chunk" is what each chunk after the first adds
    launches    operations that write (views and empty tensors are free); a row kernel is one
    bytes       allocated in all; the most at a time; both beside the inputs
    waits       the operations that wait for the device

`standing_in` and `Counter` are what tests/kernels/test_counts.py counts with. What stands beside a count was computed
from the formulas of docs/kernels.md. Nothing here was measured on a GPU.

TRL and Liger run where meta tensors let them. TRL has plain torch in place of its Triton kernel then: its products and
its passes over V x D are those of a GPU, its passes over N x V and its launches are not.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gem_kernels
from gem_kernels.backends.types import RowStats
from gem_kernels.linear import head, one_shot, products

from . import peers
from .shapes import HEADS, Head

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
            dtypes = (left.dtype, right.dtype, out.dtype)
            if left.dtype != right.dtype or out.dtype not in (left.dtype, torch.float32):
                raise TypeError(f"a GPU has no product of these dtypes: {dtypes}")
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
        if name == "_to_copy":
            to = torch.device(kwargs.get("device") or given[0].device)
            copied = given[0] if to == META else None
            found = bool(on_device) and to != META
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
        if function in self.FACTORIES and out.device == META and out.numel() and not isinstance(args[-1], Tensor):
            counter = _counting()
            if counter is not None:
                counter.waited(function.__name__)
        return out


# The row kernels on meta tensors: what they read and write, and what their launchers allocate.


def _counting() -> Counter | None:
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return next((mode for mode in modes if isinstance(mode, Counter)), None)


def _rows_forward(rows: Tensor, targets: Tensor, options, out=None, extra=None) -> RowStats:
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


# ---- the table

GROUP = 8


@dataclass(frozen=True)
class Case:
    """A path, what needs a gradient in it, and how many candidates of how many tokens there are."""

    name: str
    call: Callable
    needs: tuple[str, ...] = ("hidden", "weight")
    length: int = 512
    groups: int = 2
    again: str = "never"
    """Which logits are made again: "never"; "all"; "groups": those of a group but for its last chunk."""
    scaled: bool = True
    """The upstream scalar passes over dWeight."""

    @property
    def rows(self) -> int:
        return self.groups * GROUP * self.length


def _weigh(logprobs: Tensor, entropy: Tensor) -> Tensor:
    return (logprobs + 0.1 * entropy).sum() / 1000


def _stats(case: Case, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    out = gem_kernels.linear_token_stats(hidden, weight, targets)
    return _weigh(out.logprobs, out.entropy)


def _policy(case: Case, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return gem_kernels.fused_linear_policy_loss(hidden, weight, targets, _weigh).loss


def _sega(case: Case, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    shape = (case.groups * GROUP, case.length)
    return gem_kernels.fused_linear_sega_loss(
        hidden.view(*shape, -1),
        weight,
        targets.view(shape),
        completion_mask=torch.ones(shape, dtype=torch.bool, device="cpu"),
        answer_start=torch.empty(shape[0], dtype=torch.int64, device=META),
        group_size=GROUP,
    ).loss


CASES = (
    Case("statistics", _stats, ()),
    Case("`linear_token_stats`", _stats, again="all", scaled=False),
    Case("`fused_linear_policy_loss`", _policy),
    Case("`fused_linear_policy_loss`, frozen head", _policy, ("hidden",)),
    Case("`fused_linear_sega_loss`", _sega, again="groups"),
    Case("`fused_linear_sega_loss`, frozen head, 8 x 4,096 tokens", _sega, ("hidden",), length=4096, groups=1),
)


def predicted(case: Case, n: int) -> tuple[float, float, float]:
    """Products, passes over N x V and over V x D, at n rows a chunk."""
    group = GROUP * case.length
    chunks = again = math.ceil(case.rows / n)
    share = 1.0 if case.again == "all" else 0.0
    if case.again == "never":
        again = 0
    elif case.again == "groups":
        in_group = math.ceil(group / n)
        if in_group == 1:
            chunks, again = math.ceil(case.groups / (n // group)), 0
        else:
            chunks, again, share = case.groups * in_group, case.groups * (in_group - 1), 1 - n / group
    of_weight = "weight" in case.needs
    made = 1 + share + len(case.needs)
    logits = 2 + share + (2 + len(case.needs) if case.needs else 0)
    weight = chunks + again + (chunks if "hidden" in case.needs else 0)
    if of_weight:
        weight += (1 if chunks == 1 else 2 * chunks - 1 + 2) + (2 if case.scaled else 0)
    return made, logits, weight


def counted(case: Case, shape: Head, function: Callable | None = None) -> Counter:
    """One call, and its backward where something needs a gradient, on meta tensors, bfloat16."""
    N, V, D = case.rows, shape.vocab, shape.hidden
    hidden = torch.empty(N, D, dtype=torch.bfloat16, device=META, requires_grad="hidden" in case.needs)
    weight = torch.empty(V, D, dtype=torch.bfloat16, device=META, requires_grad="weight" in case.needs)
    targets = torch.empty(N, dtype=torch.int64, device=META)
    counter = Counter(N, V, D)
    with standing_in(), counter:
        loss = (function or case.call)(case, hidden, weight, targets)
        if case.needs:
            loss.backward()
    return counter


def rows_a_chunk(shape: Head) -> int:
    weight = torch.empty(shape.vocab, shape.hidden, dtype=torch.bfloat16, device=META)
    dtypes = (torch.bfloat16, torch.bfloat16)
    given = head.HeadParameters(weight, None, *dtypes, head.WORKSPACE_BYTES, tile_rows=head.TILE_ROWS)
    return given.rows_per_chunk


def _peer(load: Callable) -> Callable:
    def call(case: Case, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return _weigh(*load(META)(hidden, weight, targets, 1.0))

    return call


@contextlib.contextmanager
def _no_autocast_on_meta() -> Iterator[None]:
    asked = torch.is_autocast_enabled

    def enabled(kind: str | None = None) -> bool:
        return False if kind == "meta" else asked() if kind is None else asked(kind)

    with mock.patch.object(torch, "is_autocast_enabled", enabled):
        yield


PEERS = (("TRL chunked head", peers.trl_chunked), ("Liger scaled CE", peers.liger_scaled))


def lines(shape: Head, case: Case) -> Iterator[str]:
    n = min(rows_a_chunk(shape), case.rows)
    made, logits, weight = predicted(case, n)
    found = counted(case, shape)
    yield (
        f"| {shape.name} | {case.name} | {case.rows} | {n} | {made:.2f} / {found.products:.2f} "
        f"| {logits:.2f} / {found.logits_passes():.2f} | {weight:.0f} / {found.weight_passes():.1f} "
        f"| {found.launches} | {found.allocated / 2**30:.2f} | {found.peak / 2**30:.2f} | {len(found.waits)} |"
    )


def peer_lines(shape: Head) -> Iterator[str]:
    case = Case("", _stats)
    for name, load in PEERS:
        try:
            with _no_autocast_on_meta():
                found = counted(case, shape, _peer(load))
        except Exception as error:
            yield f"{name} does not run on meta tensors: {' '.join(str(error).split())[:90]}"
            continue
        yield (
            f"| {shape.name} | {name} | {case.rows} | | {found.products:.2f} | | {found.weight_passes():.1f} | "
            f"| {found.allocated / 2**30:.2f} | {found.peak / 2**30:.2f} | {len(found.waits)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", choices=[shape.name for shape in HEADS], help="one of the heads alone")
    args = parser.parse_args()
    print("Predicted / counted; bf16, the default workspace of a GPU; not measured on one.\n")
    print(
        "| head | path | rows | rows a chunk | products | N x V | V x D | launches | GiB made | GiB at most | waits |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    refused = set()
    for shape in HEADS:
        if args.head not in (None, shape.name):
            continue
        for case in CASES:
            print(*lines(shape, case), sep="\n", flush=True)
        for line in peer_lines(shape):
            if line.startswith("|"):
                print(line, flush=True)
            else:
                refused.add(line)
    print("", *sorted(refused), sep="\n")


if __name__ == "__main__":
    main()

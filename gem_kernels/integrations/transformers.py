"""A Hugging Face causal language model -> its last hidden states and its output head, without the logits.

    hidden, head = hidden_states_and_head(model, input_ids, attention_mask)
    stats = linear_token_stats(hidden[:, :-1], head.weight, input_ids[:, 1:], bias=head.bias, softcap=head.softcap,
                               logit_scale=head.logit_scale)

The model may be bare, wrapped by peft, by DistributedDataParallel, or sharded by fully_shard (FSDP2). What cannot be
read from it with certainty is refused: each architecture's head is compared with the model's own logits before its
first use. Importing this imports transformers; importing gem_kernels does not import this.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from .. import arguments

WEIGHT_DTYPES = (*arguments.LOGIT_DTYPES, torch.float64)

# How each architecture's forward treats lm_head's output, by `config.model_type`. All others: not at all.
SOFTCAPPED = {"gemma2", "gemma3_text", "nanochat", "vaultgemma"}  # tanh(z / c) * c, c = final_logit_softcapping
MULTIPLIED = {"cohere", "cohere2"}  # z * logit_scale
DIVIDED = {"granite", "granitemoe"}  # z / logits_scaling

# The largest logits of the rows that a head is checked on; None leaves the row as the model made it. A cap of 30 is
# invisible on the logits of a freshly initialised model and plain at 125.
PROBE_LOGITS = (None, 5.0, 25.0, 125.0)

# Heads found equal to their model's own logits: model -> fingerprints.
_verified: weakref.WeakKeyDictionary[nn.Module, set[tuple]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Head:
    """The output head: logits = cap(logit_scale * (hidden @ weight.T + bias)), cap(z) = softcap * tanh(z / softcap).

    The tensors are the model's own parameters, so gradients reach them.
    """

    weight: Tensor
    """[V, D]."""
    bias: Tensor | None
    """[V]."""
    softcap: float | None
    logit_scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], in the model's own order and dtype. For a few rows: this is what others avoid."""
        logits = F.linear(hidden, self.weight, self.bias)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def causal_lm_head(model: nn.Module) -> Head:
    """The output head of a causal language model.

    The first call on a model runs it on four tokens (no gradient, in eval mode, random state untouched unless the model
    draws in eval mode) and compares the head with its logits: as they come, and on hidden states scaled until the
    logits reach 125, where a cap shows. The finding is kept as long as the model and its head stay as they are.

    peft: an lm_head in `modules_to_save` gives the active copy; an lm_head that carries an active adapter is refused.
    DistributedDataParallel: the parameters of `.module`.
    FSDP2: the parameters are gathered and stay so until the next backward or `.reshard()`, so every rank must call
        this, after the forward whose hidden states it is used with (`hidden_states_and_head` does), once per forward;
        the gradient is averaged and scattered as FSDP does for all others.

    Raises:
        ValueError: the model is of no known kind, its head is not a plain linear layer, or the logits differ.
    """
    parts = _take_apart(model)
    _verify_once(parts)
    return _head(parts)


def last_hidden_states(
    model: nn.Module,
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """What the model would give its head: [B, T, D], with gradient; the head itself does not run.

    `model` is called as it stands, wrappers included, so the hooks of DistributedDataParallel, FSDP2 and peft all run.
    Under DistributedDataParallel use the head in the same backward as the hidden states, as for any parameter.

    Args:
        input_ids: [B, T]. None with `inputs_embeds=` [B, T, D].
        attention_mask, position_ids: as the model takes them; None leaves them to it.
        kwargs: passed on. `logits_to_keep` selects rows as it does for logits; `past_key_values` is extended in place.

    Raises:
        ValueError: the model is of no known kind, does not call its head once, or changes the number of tokens (prompt
            tuning); `labels` or `adapter_names` is given.
    """
    parts = _take_apart(model)
    for name in ("labels", "adapter_names"):
        if kwargs.get(name) is not None:
            arguments.fail(name, "None (the model's own head does not run)", "a value")
    tokens: Any = kwargs.get("inputs_embeds") if input_ids is None else input_ids
    arguments.check_tensor("input_ids", tokens)
    kwargs.setdefault("use_cache", kwargs.get("past_key_values") is not None)
    given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    kwargs |= {name: value for name, value in given.items() if value is not None}

    # The wrapper's output is what DDP and FSDP2 hang their backward on (DDP: unused and static-graph parameters; FSDP2:
    # gathering before backward). So the hidden states must leave through it: the head is replaced by a module that
    # keeps its input, and a hook on the outermost module below DDP puts that in the place of the output, before
    # FSDP2's hook there. Replacing `forward` instead would drop the autocast that accelerate wraps around it.
    capture = _Capture(parts.head_module)
    marks = _marks(parts) if isinstance(model, DistributedDataParallel) and torch.is_grad_enabled() else ()

    def leave(*_: Any) -> tuple[Tensor | None, ...]:
        return (_whole(capture.hidden[-1]) if capture.hidden else None, *marks)

    hook = parts.inner.register_forward_hook(leave, prepend=True)
    try:
        with _swapped(parts, capture):
            hidden = model(**kwargs)[0]
    finally:
        hook.remove()
    capture.check_called_once(parts)
    hidden = hidden.to(capture.hidden[0].dtype)  # a wrapper's output_dtype is meant for logits
    if not kwargs.get("logits_to_keep") and hidden.shape[:2] != tokens.shape[:2]:
        expected = f"a model that keeps one row for each of {tuple(tokens.shape[:2])} tokens (no prompt tuning)"
        arguments.fail("model", expected, f"hidden states {tuple(hidden.shape)} from {parts.name}")
    return hidden


def hidden_states_and_head(
    model: nn.Module,
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Head]:
    """`last_hidden_states` and `causal_lm_head` in the order that is right under every wrapper.

    Example:
        >>> hidden, head = hidden_states_and_head(model, input_ids)
        >>> torch.allclose(head.logits(hidden), model(input_ids).logits)
        True
    """
    _verify_once(_take_apart(model))
    hidden = last_hidden_states(model, input_ids, attention_mask, position_ids, **kwargs)
    return hidden, causal_lm_head(model)


@dataclass(frozen=True)
class _Parts:
    inner: nn.Module  # the outermost module below DistributedDataParallel
    causal_lm: PreTrainedModel
    parent: nn.Module  # parent._modules[key] is head_module
    key: str
    head_module: nn.Module
    linear: nn.Linear  # within head_module, where peft wraps it
    softcap: float | None
    logit_scale: float

    @property
    def name(self) -> str:
        return f"{type(self.causal_lm).__name__} (model_type {self.causal_lm.config.model_type!r})"


def _take_apart(model: nn.Module) -> _Parts:
    inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
    peft = sys.modules.get("peft")  # a model of peft's exists only where peft is imported
    causal_lm = inner.get_base_model() if peft and isinstance(inner, peft.PeftModel) else inner
    known = "a transformers causal LM, as it is, under peft, DistributedDataParallel or fully_shard"
    if not isinstance(causal_lm, PreTrainedModel):
        arguments.fail("model", known, type(causal_lm).__name__)
    if inner._compiled_call_impl is not None or causal_lm._compiled_call_impl is not None:
        arguments.fail("model", "not compiled as a whole (compile its base model, `model.model`)", "a compiled model")
    head_module: Any = causal_lm.get_output_embeddings()
    if head_module is None or causal_lm.config.is_encoder_decoder:
        arguments.fail("model", known, type(causal_lm).__name__)
    for parent in causal_lm.modules():
        for key, child in parent._modules.items():
            if child is head_module:
                return _Parts(inner, causal_lm, parent, key, head_module, _linear(head_module), *_scaling(causal_lm))
    arguments.fail("model", "a model whose output embeddings are one of its modules", type(causal_lm).__name__)


def _scaling(causal_lm: PreTrainedModel) -> tuple[float | None, float]:
    """-> softcap, logit_scale."""
    config = causal_lm.config
    if config.model_type in SOFTCAPPED:
        cap = config.final_logit_softcapping
        return None if cap is None else float(cap), 1.0
    if config.model_type in MULTIPLIED:
        return None, float(config.logit_scale)
    if config.model_type in DIVIDED:
        return None, 1.0 / config.logits_scaling
    return None, 1.0


def _linear(module: Any) -> nn.Linear:
    """The linear layer that `module` amounts to."""
    if "peft" in sys.modules:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        if isinstance(module, ModulesToSaveWrapper):
            if module.disable_adapters or not module.active_adapters:
                return _linear(module.original_module)
            return _linear(module.modules_to_save[module.active_adapters[0]])
        if isinstance(module, BaseTunerLayer) and module.disable_adapters != module.merged:
            return _linear(module.base_layer)  # either disabled, or merged into it
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        expected = "a model whose head is a plain nn.Linear (under peft: keep lm_head out of target_modules, or merge)"
        arguments.fail("model", expected, f"{type(module).__module__}.{type(module).__qualname__}")
    weight = module.weight
    if weight.dim() != 2 or weight.device.type == "meta" or weight.dtype not in WEIGHT_DTYPES:
        expected = "a model whose head weight is a whole [V, D] of float32, bfloat16 or float16"
        arguments.fail("model", expected, f"{tuple(weight.shape)} {weight.dtype} on {weight.device}")
    return module


def _head(parts: _Parts) -> Head:
    linear = parts.linear
    if isinstance(linear.weight, DTensor):
        _sharded_owner(parts).unshard()
    for parameter in (linear.weight, linear.bias):
        if isinstance(parameter, DTensor):
            _refuse_sharding(parameter)
    return Head(linear.weight, linear.bias, parts.softcap, parts.logit_scale)


def _sharded_owner(parts: _Parts) -> FSDPModule:
    """The module whose FSDP2 group holds the head: the closest one at or above it.

    Its unsharded parameter is used, and not `full_tensor()`: the gradient of that one would have to be averaged here,
    and would miss FSDP2's mixed precision, divide factor and gradient accumulation.
    """
    name = next(name for name, module in parts.inner.named_modules() if module is parts.linear)
    while not isinstance(module := parts.inner.get_submodule(name), FSDPModule):
        if not name:
            _refuse_sharding(parts.linear.weight)
        name = name.rpartition(".")[0]
    return module


def _refuse_sharding(weight: Any) -> NoReturn:
    expected = "a model whose head is whole or sharded by fully_shard alone (no tensor parallelism)"
    arguments.fail("model", expected, f"a weight placed {weight.placements} on {weight.device_mesh}")


class _Capture(nn.Module):
    """Stands in for the head: keeps its input, and returns one column of it (cheap for what follows), or, with
    `through`, what the head makes of inputs scaled to PROBE_LOGITS."""

    def __init__(self, head_module: nn.Module, through: float | None = None):
        super().__init__()
        self.head_module = head_module  # a submodule: FSDP2 looks for its modules during the first forward
        self.through = through
        self.hidden: list[Tensor] = []
        self.head_dtype: Any = None

    def forward(self, hidden: Tensor) -> Tensor:
        if self.through is not None:
            hidden = _scale_rows(hidden, self.head_module(hidden) * self.through)
        self.hidden.append(hidden)
        if self.through is None:
            return hidden[..., :1]
        logits = self.head_module(hidden)
        self.head_dtype = logits.dtype
        return logits

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["head_module"], name)  # some forwards ask for the weight's dtype

    def check_called_once(self, parts: _Parts) -> None:
        if len(self.hidden) != 1:
            expected = "a model whose forward calls its output embeddings once"
            arguments.fail("model", expected, f"{len(self.hidden)} calls in {parts.name}")


@contextlib.contextmanager
def _swapped(parts: _Parts, capture: _Capture) -> Iterator[None]:
    # Not setattr: nothing else may notice, and hooks of the head (FSDP2 gathering it) need not run.
    parts.parent._modules[parts.key] = capture
    try:
        yield
    finally:
        parts.parent._modules[parts.key] = parts.head_module


def _marks(parts: _Parts) -> tuple[Tensor, ...]:
    """Empty tensors whose graph leads to the head's parameters: `find_unused_parameters` would otherwise count these
    as unused, and fail when their gradient comes."""
    return tuple(p[:0] for p in (parts.linear.weight, parts.linear.bias) if p is not None and p.requires_grad)


def _whole(hidden: Tensor) -> Tensor:
    """`hidden[:, 0:]` -> `hidden`: FSDP2 warns of outputs that are views."""
    base = hidden._base
    if base is not None and base.shape == hidden.shape and base.stride() == hidden.stride():
        return base
    return hidden


def _verify_once(parts: _Parts) -> None:
    """Raises unless the head gives the model's own logits. Looked at again when anything it was read from changes."""
    linear, causal_lm = parts.linear, parts.causal_lm
    hooks = tuple(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in (causal_lm, parts.head_module, linear))
    scaling = (parts.softcap, parts.logit_scale)
    fingerprint = (causal_lm.config.model_type, *scaling, id(linear), linear.bias is None, linear.weight.shape, hooks)
    seen = _verified.setdefault(causal_lm, set())
    if fingerprint not in seen:
        _verify(parts)
        seen.add(fingerprint)


@torch.no_grad()
def _verify(parts: _Parts) -> None:
    # One forward gives both the hidden states and the logits, so no dropout lies between the two; eval mode besides,
    # so that the caller's random numbers are not consumed. The flags are set one by one: train() may do more.
    if isinstance(parts.linear.weight, DTensor):
        _sharded_owner(parts)  # refuses other sharding before a forward that would fail on it
    capture = _Capture(parts.head_module, through=parts.logit_scale)
    training = [module for module in parts.inner.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with _swapped(parts, capture):
            own = parts.inner(input_ids=_probe_ids(parts.causal_lm), use_cache=False).logits
    finally:
        for module in training:
            module.training = True
    capture.check_called_once(parts)

    head = _head(parts)
    logits = head.logits(capture.hidden[0].to(head.weight.dtype))
    if own.shape != logits.shape:
        _refuse(parts, f"its logits are {tuple(own.shape)}, its head makes {tuple(logits.shape)}")
    # Both round in the coarsest dtype that the logits pass through (autocast computes a float32 head in bfloat16):
    # a few times half a unit each, on average over the row and at most.
    eps = max(torch.finfo(x).eps for x in (own.dtype, logits.dtype, capture.head_dtype))
    own, logits = own.double(), logits.double()
    difference = torch.where(own == logits, 0.0, own - logits)  # -inf is equal to -inf
    size = torch.where(own.isfinite(), own, 0.0)
    mean_error = difference.norm(dim=-1) / size.norm(dim=-1).clamp_min(1e-30)
    worst_error = difference.abs().amax(-1) / size.abs().amax(-1).clamp_min(1e-30)
    if not bool(((mean_error <= max(2 * eps, 1e-5)) & (worst_error <= max(8 * eps, 4e-5))).all()):
        largest = float(difference.abs().max())
        share = float(worst_error.max())
        _refuse(parts, f"they differ by up to {largest:.4g} ({share:.2g} of the row's largest, {own.shape[-1]} words)")


def _refuse(parts: _Parts, why: str) -> None:
    raise ValueError(
        f"unknown head: {parts.name} makes other logits from its last hidden states than "
        f"softcap={parts.softcap}, logit_scale={parts.logit_scale:g} and its output embeddings do: {why}. "
        "Use the logits of this model, or teach gem_kernels.integrations.transformers its head."
    )


def _probe_ids(causal_lm: PreTrainedModel) -> Tensor:
    """[1, 4] ordinary tokens, far apart."""
    config = causal_lm.config.get_text_config()
    V = config.vocab_size
    named = {**causal_lm.config.to_dict(), **config.to_dict()}
    special = {v for k, v in named.items() if isinstance(v, int) and k.endswith(("_token_id", "_token_index"))}
    spread = [i * V // 64 for i in range(64)]
    ids = [i for i in dict.fromkeys(spread) if i not in special] or [0]
    n = len(PROBE_LOGITS)
    chosen = [ids[i * len(ids) // n] for i in range(n)]
    return torch.tensor([chosen], dtype=torch.int64, device=causal_lm.device)


def _scale_rows(hidden: Tensor, logits: Tensor) -> Tensor:
    """Rows of `hidden`, scaled so that their largest logits are PROBE_LOGITS in turn."""
    logits = logits.double()
    largest = torch.where(logits.isfinite(), logits, 0.0).abs().amax(-1)
    numbers = [PROBE_LOGITS[i % len(PROBE_LOGITS)] or 0.0 for i in range(largest.numel())]
    targets = torch.tensor(numbers, dtype=torch.float64, device=hidden.device).view_as(largest)
    factor = torch.where((targets > 0) & (largest > 0), targets / largest, 1.0)
    room = 0.25 * torch.finfo(hidden.dtype).max / hidden.double().abs().amax(-1).clamp_min(1e-30)
    return (hidden.double() * torch.minimum(factor, room).unsqueeze(-1)).to(hidden.dtype)

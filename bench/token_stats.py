"""Logits -> log-probs and entropies, forward and backward, against eager torch: `python -m bench.token_stats`.

The rivals run in turn in one process; printed are the medians, the ratio, and the largest error against float64.
Eager is what trainers write: log_softmax and softmax in float32, product, sum, gather; its backward is autograd's.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import time

import torch

import gem_kernels


def eager(logits, targets):
    logits = logits.float()
    logp = torch.log_softmax(logits, -1)
    entropy = -(torch.softmax(logits, -1) * logp).sum(-1)
    return logp.gather(-1, targets[:, None])[:, 0], entropy


def ours(logits, targets):
    stats = gem_kernels.token_stats(logits, targets)
    return stats.logprobs, stats.entropy


def milliseconds(function, device) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def backward(function, logits, targets, device) -> float:
    """Milliseconds of backward alone, of a loss that uses both outputs."""
    leaf = logits.detach().requires_grad_()
    logprobs, entropy = function(leaf, targets)
    loss = (logprobs + 0.1 * entropy).sum()
    return milliseconds(loss.backward, device)


def describe() -> str:
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"{device}; torch {torch.__version__}, Python {platform.python_version()}; commit {commit or 'unknown'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    logits = (torch.randn(args.rows, args.vocab, device=device) * 3).to(getattr(torch, args.dtype))
    targets = torch.randint(0, args.vocab, (args.rows,), device=device)

    few = slice(0, min(64, args.rows))
    truth = eager_float64(logits[few], targets[few])
    print(describe())
    print(f"[{args.rows}, {args.vocab}] {args.dtype}, median of {args.repeats} interleaved runs")
    times: dict[str, list[float]] = {}
    with torch.no_grad():
        for function in (eager, ours):
            function(logits, targets)
    for _ in range(args.repeats):
        for function in (eager, ours):
            with torch.no_grad():
                elapsed = milliseconds(lambda f=function: f(logits, targets), device)
            times.setdefault(f"{function.__name__} forward", []).append(elapsed)
            times.setdefault(f"{function.__name__} backward", []).append(backward(function, logits, targets, device))
    for step in ("forward", "backward"):
        slow, fast = (statistics.median(times[f"{name} {step}"]) for name in ("eager", "ours"))
        print(f"{step:8}  eager {slow:8.1f} ms   gem_kernels {fast:8.1f} ms   {slow / fast:5.1f} times as fast")
    for function in (eager, ours):
        with torch.no_grad():
            out = function(logits[few], targets[few])
        errors = [float((x.double() - t).abs().max()) for x, t in zip(out, truth)]
        print(f"largest error against float64, {function.__name__}: logprob {errors[0]:.1e}, entropy {errors[1]:.1e}")


def eager_float64(logits, targets):
    logp = torch.log_softmax(logits.double(), -1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


if __name__ == "__main__":
    main()

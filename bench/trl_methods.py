"""One loss with its gradients in TRL's trainers, TRL's own head and this package's: `python -m bench.trl_methods`.

A Llama of two layers (D = 256) with SmolLM2's vocabulary (49,152), fp32, BATCH sequences of LENGTH tokens (pairs for
DPO), three quarters of them completion. For each method one trainer and one batch; `compute_loss` and its backward run
with and without `use_gem_kernels()` in turn: DPO's and KTO's reference models are in it, sampling is not. Ratios of
each round, and their median. Memory is the most that one call held above what stood before it.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import datasets
import tokenizers
import torch
import transformers
import trl

from bench import measure
from gem_kernels.integrations.trl import use_gem_kernels

V, D, BATCH, LENGTH = 49_152, 256, 4, 64
METHODS = ("SFT", "DPO", "KTO", "GRPO", "RLOO")


def word_tokenizer(vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """One token a word: w0, w1, ..."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(vocab_size - 3))]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def data(method: str, vocab_size: int, batch: int, length: int) -> datasets.Dataset:
    draw = random.Random(0)

    def texts(size: int) -> list[str]:
        return [" " + " ".join(f"w{draw.randrange(vocab_size - 3)}" for _ in range(size)) for _ in range(batch)]

    found = {"prompt": texts(length // 4)}
    answer = length - length // 4 - 1
    if method == "SFT":
        found["completion"] = texts(answer)
    elif method == "DPO":
        found |= {"chosen": texts(answer), "rejected": texts(answer)}
    elif method == "KTO":
        return datasets.Dataset.from_dict({
            **found, "completion": texts(answer), "label": [i % 2 == 0 for i in range(batch)],
        })  # fmt: skip
    return datasets.Dataset.from_dict(found)


def step(method: str, folder: str, sizes: tuple[int, int, int, int]) -> Callable[[], None]:
    """One loss of the method's trainer on one batch, with its gradients."""
    vocab_size, hidden_size, batch, length = sizes
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)  # TRL loads reference models by name
    settings: dict[str, Any] = {
        "output_dir": folder, "per_device_train_batch_size": batch, "max_steps": 1, "report_to": [], "use_cpu": True,
        "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False, "save_strategy": "no",
    }  # fmt: skip
    given: dict[str, Any] = {}
    if method in ("GRPO", "RLOO"):
        settings |= {"num_generations": batch, "max_completion_length": length - length // 4}
        given["reward_funcs"] = lambda completions, **_: [float(len(text) % 7) for text in completions]
    trainer = getattr(trl, f"{method}Trainer")(
        folder, args=getattr(trl, f"{method}Config")(**settings), processing_class=word_tokenizer(vocab_size),
        train_dataset=data(method, vocab_size, batch, length), **given,
    )  # fmt: skip
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))

    def run() -> None:
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, inputs).backward()

    return run


def compare(method: str, rounds: int, sizes: tuple[int, int, int, int]) -> tuple[list[float], list[float], dict]:
    """-> seconds with TRL's own, seconds with ours, most bytes of both."""
    cpu, times, peaks = torch.device("cpu"), {"own": [], "ours": []}, {}
    with tempfile.TemporaryDirectory() as folder:
        run = step(method, folder, sizes)

        def one(who: str) -> Callable[[], None]:
            def call() -> None:
                with use_gem_kernels() if who == "ours" else contextlib.nullcontext():
                    run()

            return call

        for number in range(rounds + 1):
            for who in times:
                seconds = measure.seconds(one(who), cpu)
                if number:  # the first is to warm up
                    times[who].append(seconds)
        for who in times:
            peaks[who] = measure.peak_extra(lambda who=who: one(who), cpu)
    return times["own"], times["ours"], peaks


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--sizes", type=int, nargs=4, default=(V, D, BATCH, LENGTH), metavar=("V", "D", "B", "T"))
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, trl {trl.__version__}, transformers {transformers.__version__}, "
          f"{torch.get_num_threads()} thread(s), V D B T = {tuple(given.sizes)}, {given.rounds} rounds")  # fmt: skip
    print(
        "| method | TRL's own, ms | ours, ms | ours / own | MiB, own | MiB, ours |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for method in given.methods:
        own, ours, peaks = compare(method, given.rounds, tuple(given.sizes))
        ratio = statistics.median(b / a for a, b in zip(own, ours))
        mib = ["-" if peaks[who] is None else f"{peaks[who] / measure.MIB:.0f}" for who in ("own", "ours")]
        times = " | ".join(f"{1e3 * statistics.median(x):.0f}" for x in (own, ours))
        print(f"| {method} | {times} | {ratio:.2f} | {' | '.join(mib)} |", flush=True)


if __name__ == "__main__":
    main()

"""Prompts -> candidates: several prompts in one batch, G candidates each, with the sampler's own token ids.

The sampling loop is written out rather than left to `generate`: the prompt then runs once for its G candidates, rows
leave the batch when they end (on a CPU the longest row would otherwise be paid for by all), log-prob and entropy of a
token are taken from the logits that are there anyway, and the randomness of a candidate is its own: a function of
(seed, step, prompt, candidate), whatever the batch or process it is sampled in. Logits are filtered by transformers'
own processors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gem.config.settings import Sampling
from gem.data.answers import AnswerSpans, decode, find_answer_spans
from gem.data.batches import CompletionBatch, collate, pad_rows, positions
from gem.data.prompts import TextFormat
from gem.model.forward import Policy, forward
from gem.parallel import processes
from gem.progress import Bar, advance
from gem.rollout.cache import sampling_cache
from gem.rollout.cpu_linear import few_row_products
from gem_kernels import token_stats

# Rows that have ended are dropped from the batch when they are a quarter of it: dropping copies the cache once.
_KEEP_SHARE = 0.75
# Rows of logits on a CPU whose probabilities are made at a time: in float64 those of a batch are far more than a cache.
_CPU_ROWS = 8


@dataclass(frozen=True)
class SampledTokens:
    """One candidate, cut at its first end token (inclusive): its ids and, where recorded, their statistics [n] fp32."""

    ids: list[int]
    logprobs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


@dataclass(frozen=True)
class Rollout:
    """Candidates of P prompts, B = P * G, cut at their first end token (inclusive).

    logprobs, entropy [B, T] fp32, zero under the padding: of the sampled tokens, in nats, at the temperature they were
    recorded for, by the weights that sampled. None where nothing was recorded.
    """

    batch: CompletionBatch
    truncated: torch.Tensor  # [B] bool: ended by max_completion_length, not by an end token
    texts: tuple[str, ...]  # [B] without the end token
    spans: AnswerSpans
    logprobs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


class Sampler(Protocol):
    """Another engine that samples (gem.rollout.vllm)."""

    def update(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Gives the engine the weights as they are now."""

    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, end_token_ids: Sequence[int], keys: np.ndarray
    ) -> list[SampledTokens]:
        """G candidates for each prompt, those of one prompt together; `keys` [P * G] are their random keys."""


def roll_out(
    policy: Policy,
    form: TextFormat,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seed: int,
    batch_size: int,
    step: int = 0,
    stats_temperature: float | None = None,
    sampler: Sampler | None = None,
    bar: Bar | None = None,
) -> Rollout:
    """Samples G candidates for each prompt, `batch_size` prompts at a time, and finds their answer spans.

    With several processes each samples its share of the prompts, and all return the whole. `stats_temperature`: record
    log-probs and entropies at this temperature, so that scoring them needs no forward.
    """
    rows: list[list[SampledTokens]] = []  # by prompt
    mine = processes.share(range(len(prompts)))
    size = sampling.num_generations
    if sampler is not None:  # it makes batches of its own
        keys = row_keys(seed, step, mine, size)
        found = sampler.sample([prompts[i] for i in mine], sampling, form.end_tokens, keys) if mine else []
        rows += [found[i : i + size] for i in range(0, len(found), size)]
        advance(bar, len(mine))
    else:
        with processes.gathered(policy.model), few_row_products(policy.model):
            for start in range(0, len(mine), batch_size):
                part = mine[start : start + batch_size]
                keys = row_keys(seed, step, part, size)
                padded = pad_rows([prompts[i] for i in part], form.pad_id, left=True)
                found = sample_tokens(policy.model, *padded, sampling, form.end_tokens, keys, stats_temperature)
                rows += [found[i : i + size] for i in range(0, len(found), size)]
                advance(bar, len(part))
    flat = [row for group in processes.gather(rows) for row in group]
    statistics = [(row.logprobs, row.entropy) for row in flat] if flat and flat[0].logprobs is not None else None
    return given_completions(form, prompts, [row.ids for row in flat], statistics)


def given_completions(
    form: TextFormat,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    statistics: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> Rollout:
    """Token ids of completions, sampled here or written elsewhere, as a rollout; G = completions / prompts.

    statistics: (log-probs [n], entropies [n]) of each completion's tokens, where they are known.
    """
    batch = collate(prompts, completions, form.pad_id)
    logprobs = entropy = None
    if statistics is not None:
        logprobs, entropy = torch.zeros(2, *batch.completion_ids.shape).unbind()
        for row, known in enumerate(statistics):
            for table, values in zip((logprobs, entropy), known):
                table[row, : len(values)] = values
    ended = [bool(row) and row[-1] in form.end_tokens for row in completions]
    return Rollout(
        batch=batch,
        truncated=~torch.tensor(ended, dtype=torch.bool),
        texts=tuple(decode(form.tokenizer, [row[:-1] if end else row for row, end in zip(completions, ended)])),
        spans=find_answer_spans(
            form.tokenizer, batch.completion_ids, batch.completion_mask, form.finders, form.end_tokens
        ),
        logprobs=logprobs,
        entropy=entropy,
    )


@torch.no_grad()
def sample_tokens(
    model: PreTrainedModel,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    sampling: Sampling,
    end_token_ids: Sequence[int],
    keys: np.ndarray,
    stats_temperature: float | None = None,
) -> list[SampledTokens]:
    """G candidates for each left-padded prompt [P, L]; `keys` [P * G] from `row_keys`."""
    model.eval()
    device, size, most = model.device, sampling.num_generations, sampling.max_completion_length
    prompt_ids, prompt_mask = prompt_ids.to(device), prompt_mask.to(device)
    ends = torch.tensor(sorted(end_token_ids), device=device)
    output = forward(
        model,
        1,
        input_ids=prompt_ids,
        attention_mask=prompt_mask.long(),
        position_ids=positions(prompt_mask),
        past_key_values=sampling_cache(model.config),
        use_cache=True,
    )
    cache = output.past_key_values
    cache.batch_repeat_interleave(size)
    logits = output.logits[:, -1].repeat_interleave(size, 0)
    mask = prompt_mask.repeat_interleave(size, 0)
    position = mask.sum(1)
    ids = torch.zeros(len(logits), most, dtype=torch.int64, device=device)
    statistics = None if stats_temperature is None else torch.zeros(2, *ids.shape, device=device)
    lengths = torch.zeros(len(ids), dtype=torch.int64, device=device)
    alive = torch.arange(len(ids), device=device)  # the row of the output that each row of the batch writes
    ended = torch.zeros_like(alive, dtype=torch.bool)
    draws = uniforms(keys, most).to(device)
    # For the repetition penalty. The padding becomes the prompt's last token, as a penalty must not know of padding.
    prompt_ids = prompt_ids.where(prompt_mask, prompt_ids[:, -1:]).repeat_interleave(size, 0)
    for step in range(most):
        seen = torch.cat([prompt_ids[alive], ids[alive, :step]], 1) if sampling.repetition_penalty != 1.0 else None
        tokens = pick_tokens(logits, sampling, draws[alive, step], seen)
        ids[alive, step] = tokens
        lengths[alive] = torch.where(ended, lengths[alive], step + 1)
        if statistics is not None:
            stats = token_stats(logits, tokens, temperature=stats_temperature)
            statistics[0, alive, step], statistics[1, alive, step] = stats.logprobs, stats.entropy
        ended = ended | torch.isin(tokens, ends)
        left = int((~ended).sum())  # the one wait for the device a token
        if left == 0 or step + 1 == most:
            break
        if left <= _KEEP_SHARE * len(alive):
            keep = (~ended).nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            tokens, alive, mask, position, ended = (x[keep] for x in (tokens, alive, mask, position, ended))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = forward(
            model,
            1,
            input_ids=tokens[:, None],
            attention_mask=mask.long(),
            position_ids=position[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        position = position + 1
    rows = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist())]
    if statistics is None:
        return [SampledTokens(row) for row in rows]
    logprobs, entropy = statistics.cpu().unbind()
    return [SampledTokens(row, logprobs[i, : len(row)], entropy[i, : len(row)]) for i, row in enumerate(rows)]


def pick_tokens(
    logits: torch.Tensor, sampling: Sampling, draws: torch.Tensor, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """One token for each row of logits [R, V]: the first whose cumulated probability exceeds the row's draw in [0, 1).

    seen [R, L]: the tokens so far, for the repetition penalty. Probabilities are cumulated in the vocabulary's order,
    in float64: rounding that moves two equal probabilities past each other would reorder a sorted one.
    """
    process, greedy = processors(sampling), sampling.temperature == 0
    size = _CPU_ROWS if logits.device.type == "cpu" else max(1, len(logits))
    found = []
    for i in range(0, len(logits), size):
        rows = slice(i, i + size)
        scores = process(None if seen is None else seen[rows], logits[rows].float())
        found.append(scores.argmax(-1) if greedy else _draw(scores, draws[rows]))
    return torch.cat(found)


def _draw(scores: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    cumulated = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = cumulated[:, -1]
    target = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, target[:, None], right=True).squeeze(1)


def processors(sampling: Sampling) -> LogitsProcessorList:
    """transformers' processors in the order `generate` has them; those that do nothing are left out."""
    found = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature == 0:
        return found
    if sampling.temperature != 1.0:
        found.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        found.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0.0:
        found.append(MinPLogitsWarper(sampling.min_p))
    return found


def row_keys(seed: int, step: int, prompts: Sequence[int], num_generations: int) -> np.ndarray:
    """The random key of each candidate, uint64 [P * G]: a hash of (seed, step, prompt's index, candidate)."""
    names = (f"{seed}/{step}/{prompt}/{i}" for prompt in prompts for i in range(num_generations))
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    return np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)


def uniforms(keys: np.ndarray, length: int) -> torch.Tensor:
    """Draws in [0, 1), float64 [R, length]: the first `length` outputs of SplitMix64 started at each key."""
    counters = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = keys[:, None] + counters[None, :]  # modulo 2^64, as are the products
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) * 2.0**-53)

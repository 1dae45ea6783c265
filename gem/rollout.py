"""Prompts -> candidates: several prompts in one batch, G candidates each, with the sampler's own token ids.

The sampling loop is written out rather than left to `generate`: the prompt then runs once for its G candidates, rows
leave the batch when they end (on a CPU the longest row would otherwise be paid for by all), and the randomness is one
seeded generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from gem.data import CompletionBatch, collate, pad_rows
from gem.policy import forward, positions
from gem.progress import Progress
from gem.spans import AnswerSpans, decode, find_answer_spans

# Rows that have ended are dropped from the batch when they are a quarter of it: dropping copies the cache once.
_KEEP_SHARE = 0.75


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0: the most likely token. top_k 0 and top_p 1.0: no truncation."""

    num_generations: int
    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Rollout:
    """Candidates of P prompts, B = P * G, cut at their first end token (inclusive)."""

    batch: CompletionBatch
    truncated: torch.Tensor  # [B] bool: ended by max_completion_length, not by an end token
    texts: tuple[str, ...]  # [B] without the end token
    spans: AnswerSpans


def roll_out(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    end_token_ids: Sequence[int],
    marker: str,
    seed: int,
    batch_size: int,
    progress: Progress | None = None,
) -> Rollout:
    """Samples G candidates for each prompt, `batch_size` prompts at a time, and finds their answer spans."""
    generator = torch.Generator(model.device).manual_seed(seed)
    rows: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        prompt_ids, prompt_mask = pad_rows(chunk, tokenizer.pad_token_id, left=True)
        rows += sample_tokens(model, prompt_ids, prompt_mask, sampling, end_token_ids, generator)
        if progress is not None:
            progress.advance(len(chunk))
    return given_completions(tokenizer, prompts, rows, end_token_ids=end_token_ids, marker=marker)


def given_completions(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    end_token_ids: Sequence[int],
    marker: str,
) -> Rollout:
    """Token ids of completions, sampled here or written elsewhere, as a rollout; G = completions / prompts."""
    batch = collate(prompts, completions, tokenizer.pad_token_id)
    ended = [bool(row) and row[-1] in end_token_ids for row in completions]
    return Rollout(
        batch=batch,
        truncated=~torch.tensor(ended, dtype=torch.bool),
        texts=tuple(decode(tokenizer, [row[:-1] if end else row for row, end in zip(completions, ended)])),
        spans=find_answer_spans(tokenizer, batch.completion_ids, batch.completion_mask, marker, end_token_ids),
    )


@torch.inference_mode()
def sample_tokens(
    model: PreTrainedModel,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    sampling: Sampling,
    end_token_ids: Sequence[int],
    generator: torch.Generator,
) -> list[list[int]]:
    """Token ids of G candidates for each left-padded prompt [P, L], each cut at its first end token, inclusive."""
    model.eval()
    device = model.device
    ends = torch.tensor(sorted(end_token_ids), device=device)
    prompt_mask = prompt_mask.to(device)
    output = forward(
        model,
        1,
        input_ids=prompt_ids.to(device),
        attention_mask=prompt_mask.long(),
        position_ids=positions(prompt_mask),
        past_key_values=DynamicCache(config=model.config),
        use_cache=True,
    )
    cache = output.past_key_values
    cache.batch_repeat_interleave(sampling.num_generations)
    logits = output.logits[:, -1].repeat_interleave(sampling.num_generations, 0)
    mask = prompt_mask.repeat_interleave(sampling.num_generations, 0)
    position = mask.sum(1)
    rows: list[list[int]] = [[] for _ in range(len(logits))]
    alive = torch.arange(len(logits), device=device)  # the row of the output that each row of the batch writes
    ended = torch.zeros_like(alive, dtype=torch.bool)
    for step in range(sampling.max_completion_length):
        tokens = pick_tokens(logits, sampling, generator)
        for row, token, done in zip(alive.tolist(), tokens.tolist(), ended.tolist()):
            if not done:
                rows[row].append(token)
        ended = ended | torch.isin(tokens, ends)
        if bool(ended.all()) or step + 1 == sampling.max_completion_length:
            break
        if int((~ended).sum()) <= _KEEP_SHARE * len(alive):
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
    return rows


def pick_tokens(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """One token for each row of logits [R, V]: temperature, then the top k, then the nucleus of mass top_p."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scaled = logits.float() / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probs = scaled.softmax(-1)
    if sampling.top_p < 1:
        ordered, index = probs.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # a token stays while the mass before it is below top_p
        probs = torch.zeros_like(probs).scatter(-1, index, ordered.masked_fill(before >= sampling.top_p, 0.0))
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)

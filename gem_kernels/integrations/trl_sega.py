"""SEGA in TRL: GRPO whose reward is the entropy score that the policy gives its own completions.

    from gem_kernels.integrations.trl_sega import SEGAConfig, SEGATrainer

    SEGATrainer(model, args=SEGAConfig(...), train_dataset=dataset).train()

Sampling, the loss, vLLM, PEFT, DeepSpeed, FSDP, logging and checkpoints are GRPOTrainer's. Written for TRL 1.16, three
of whose private methods it overrides or calls; their parameters are looked at when this is imported.
"""

from __future__ import annotations

import inspect
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from .. import arguments
from ..answers import answer_start
from ..score_file import read_score_file
from ..scores import MAPPINGS, NO_ANSWER, SCALES, completion_features, group_advantages
from ..types import CompletionFeatures, LinearScore

WRITTEN_FOR = "1.16"
TOP_M = 0.1
# What a forward of a multimodal model needs beside the tokens, by its name in TRL's batches.
EXTRA_INPUTS = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip
# Methods of GRPOTrainer -> their first parameters there; the last one takes EXTRA_INPUTS too.
METHODS = {
    "_generate_and_score_completions": "self inputs",
    "_calculate_rewards": "self inputs prompts completions completion_ids_list",
    "_get_per_token_logps_and_entropies": (
        "self model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss"
    ),
}


def check_trl() -> None:
    """ValueError where GRPOTrainer is not the one this is written for."""
    for name, first in METHODS.items():
        method = getattr(GRPOTrainer, name, None)
        expected = first.split() + (list(EXTRA_INPUTS) if "model" in first else [])
        found = [] if method is None else list(inspect.signature(method).parameters)
        if found[: len(first.split())] != first.split() or set(found) != set(expected):
            wanted = f"of version {WRITTEN_FOR}, whose GRPOTrainer.{name} takes ({', '.join(expected)})"
            got = "without it" if method is None else f"whose one takes ({', '.join(found)})"
            arguments.fail("trl", wanted, f"{trl.__version__}, {got}")


check_trl()


@dataclass
class SEGAConfig(GRPOConfig):
    """GRPOConfig, and what the entropy score is.

        S = -final_weight * H_final + fork_weight * H_fork      score="paper" (GEM, arXiv 2511.13007, Eq. 1)
        S = sum_f weights[f] / scales[f] * x_f                  a LinearScore, or the path of a score.json
        r = score_weight * S + sum_k reward_weights[k] * reward_k
        A = f(r) - mean of f(r) over the valid completions of the prompt      f: reward_mapping       (Eq. 2)

    Entropies and log-probs are those of the policy at `temperature`, before the update. The defaults of two of TRL's
    settings differ: `scale_rewards` is "none" (the paper only centres) and takes "none" and "group" alone.

    Args:
        score: "paper"; the path of a score.json that `gem calibrate` wrote; a `LinearScore`, or its weights and scales
            as a dictionary.
        answer_marker: the final answer stands after its last occurrence: a text, several of them, the ids of its
            tokens, or several such lists. A text is looked for in the decoded completions; ids on the device, which
            waits for nothing. None: there is no marker, and `no_answer` says what the answer is.
        no_answer: "tail": the last fifth of a completion without marker is its answer; "exclude": it is left out of
            its group, with advantage 0.
        final_weight, fork_weight: of the paper's score.
        top_m: share (below or equal 1.0) or count of the reasoning tokens in H_fork; None: that of the score.json,
            else 0.1.
        reward_mapping: f: "identity", "softmax" over the group, or "rank".
        score_weight: of the score beside the rewards of `reward_funcs`.

    Raises:
        ValueError: a setting is not as above.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "score"]  # noqa: RUF012

    score: LinearScore | str | None = field(
        default="paper", metadata={"help": "`paper`, the path of a score.json, or weights and scales as JSON."}
    )
    answer_marker: list[str] | str | None = field(
        default="Final Answer:", metadata={"help": "Text (or, in Python, token ids) before the final answer."}
    )
    no_answer: str = field(
        default="tail", metadata={"help": "A completion without marker: `tail` or `exclude`.", "choices": NO_ANSWER}
    )
    final_weight: float = field(default=1.0, metadata={"help": "Weight of H_final in the paper's score."})
    fork_weight: float = field(default=1.0, metadata={"help": "Weight of H_fork in the paper's score."})
    top_m: float | None = field(
        default=None,
        metadata={"help": "Share or count of the reasoning tokens in H_fork; the file's, or 0.1."},
    )
    reward_mapping: str = field(
        default="identity", metadata={"help": "Of rewards within a group.", "choices": MAPPINGS}
    )
    score_weight: float = field(default=1.0, metadata={"help": "Weight of the score beside other rewards."})
    scale_rewards: str = field(
        default="none", metadata={"help": "`group`: divide by the group's standard deviation.", "choices": SCALES}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.score, dict):
            self.score = LinearScore(**self.score)
        elif self.score is None:
            self.score = "paper"
        elif not isinstance(self.score, (str, LinearScore)):
            arguments.fail("score", "'paper', the path of a score.json, or a LinearScore", type(self.score).__name__)
        if isinstance(self.top_m, float) and self.top_m > 1 and self.top_m.is_integer():
            self.top_m = int(self.top_m)  # a count, from a command line
        if self.top_m is not None:
            arguments.check_top_m(self.top_m)
        _check_marker(self.answer_marker)
        arguments.check_choice("no_answer", self.no_answer, NO_ANSWER)
        arguments.check_choice("reward_mapping", self.reward_mapping, MAPPINGS)
        arguments.check_choice("scale_rewards", self.scale_rewards, SCALES)
        for name in ("final_weight", "fork_weight", "score_weight"):
            arguments.check_number(name, getattr(self, name))
        if self.score != "paper" and (self.final_weight, self.fork_weight) != (1.0, 1.0):
            given = f"{self.final_weight} and {self.fork_weight}"
            arguments.fail("final_weight and fork_weight", "left out where `score` is not 'paper'", given)
        arguments.check_choice("multi_objective_aggregation", self.multi_objective_aggregation, ["sum_then_normalize"])

    def to_dict(self) -> dict[str, Any]:
        found = super().to_dict()
        if isinstance(self.score, LinearScore):
            found["score"] = {"weights": dict(self.score.weights), "scales": dict(self.score.scales)}
        return found


def entropy_score(completions: Sequence[Any], **_: Any) -> list[float]:
    """The score's place among TRL's reward functions; SEGATrainer fills it in when the entropies are there."""
    return [0.0] * len(completions)


class SEGATrainer(GRPOTrainer):
    """GRPOTrainer whose reward is the policy's own entropy score. `SEGAConfig` has the formulas and settings.

    For each batch of completions:

        TRL samples them (transformers or vLLM) and calls `reward_funcs`, where there are any
        the policy's entropies and log-probs of their tokens: of the forward that TRL makes for its old log-probs
            anyway, else of one more, without gradient
        answer spans, features and scores, in the process that sampled them
        scores and rewards of all processes -> advantages of each prompt's group
        the advantages go in the place of TRL's, and the rest is GRPO

    A completion that is empty (a truncated one under `mask_truncated_completions`), or without answer under
    `no_answer="exclude"`, is not valid: its advantage is 0, and it is left out of its group's mean.

    Logged: gem/score, gem/h_final and gem/h_fork (means over the valid completions), gem/valid and
    gem/answer_span_found (shares of the completions); and TRL's own metrics, where `reward` is r, and the score is
    `rewards/entropy_score`.

    Args:
        model, args, train_dataset, eval_dataset, processing_class: as for GRPOTrainer; args: a SEGAConfig.
        reward_funcs, reward_processing_classes: optional. Their rewards are added to the score, each with its weight of
            `reward_weights`. None counts as 0.
        The rest of GRPOTrainer's parameters, by name.

    Raises:
        ValueError: args is no SEGAConfig, the score.json cannot be used, or `reward_weights` does not fit.

    Example:
        >>> config = SEGAConfig("out", score="score.json", num_generations=8, answer_marker="Final Answer:")
        >>> SEGATrainer("HuggingFaceTB/SmolLM2-135M-Instruct", args=config, train_dataset=dataset).train()

    Source: GEM (arXiv 2511.13007), Eq. 1 and 2, with GRPO's loss.
    """

    _tag_names = ["trl", "sega"]  # noqa: RUF012
    _name = "SEGA"
    _paper = {  # noqa: RUF012
        "title": "GEM: Generative Entropy-Guided Preference Modeling for Few-shot Alignment of LLMs",
        "id": "2511.13007",
        "citation": textwrap.dedent("""\
            @inproceedings{zhao2026gem,
                title        = {{GEM: Generative Entropy-Guided Preference Modeling for Few-shot Alignment of LLMs}},
                author       = {Yiyang Zhao and Huiyu Bai and Xuejiao Zhao},
                year         = 2026,
                booktitle    = {AAAI},
                eprint       = {arXiv:2511.13007},
            }"""),
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: SEGAConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        **more: Any,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = SEGAConfig(f"{name.split('/')[-1]}-SEGA")
        if not isinstance(args, SEGAConfig):
            arguments.fail("args", "a SEGAConfig", type(args).__name__)
        self.linear_score, self.top_m = _score_and_top_m(args)
        given = _as_list(reward_funcs)
        weights = args.reward_weights if args.reward_weights is not None else [1.0] * len(given)
        if len(weights) != len(given):
            arguments.fail("reward_weights", f"one for each of the {len(given)} reward_funcs", weights)
        if reward_processing_classes is not None:
            reward_processing_classes = [*_as_list(reward_processing_classes), None]
        own_weights, args.reward_weights = args.reward_weights, [*weights, args.score_weight]
        try:
            super().__init__(
                model,
                [*given, entropy_score],
                args,
                train_dataset,
                eval_dataset,
                processing_class,
                reward_processing_classes,
                **more,
            )
        finally:
            args.reward_weights = own_weights
        self._score_column = len(given)
        self._rewards: Tensor | None = None
        self._watching = False
        self._watched: tuple[Tensor, Tensor] | None = None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._watching, self._watched = True, None
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._watching = False
        logprobs, entropy = self._statistics(output)
        features, found = self._features(output, logprobs, entropy)
        local = [features.score(self.linear_score), features.final_entropy, features.fork_entropy]
        local += [features.valid.float(), found.float()]
        score, final, fork, valid, found = self.accelerator.gather(torch.stack(local, 1)).unbind(1)
        valid = valid.bool()
        assert self._rewards is not None
        rewards_per_func, self._rewards = self._rewards, None
        rewards_per_func[:, self._score_column] = torch.where(valid, score, torch.nan)
        rewards = (rewards_per_func * self.reward_weights.to(score.device)).nansum(1)
        training = self.model.training
        G: Any = self.num_generations if training else self.num_generations_eval
        options = {"mapping": self.args.reward_mapping, "scale": self.args.scale_rewards}
        advantages = group_advantages(rewards, G, valid=valid, **options)
        self._log_scores(rewards_per_func, torch.where(valid, rewards, torch.nan), advantages, G)
        metrics = self._metrics["train" if training else "eval"]
        for name, values in (("score", score), ("h_final", final), ("h_fork", fork)):
            metrics[f"gem/{name}"].append(values[valid].mean().item())
        for name, share in (("valid", valid), ("answer_span_found", found)):
            metrics[f"gem/{name}"].append(share.float().mean().item())
        size = len(inputs)
        output["advantages"] = advantages[self.accelerator.process_index * size :][:size]
        return output

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """[completions of all processes, reward functions]; kept for the score's column."""
        self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards.clone()

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Of the policy's first forward while completions are made, which TRL asks for log-probs, the entropies too."""
        if not (self._watching and model is self.model and self._watched is None):
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        found = super()._get_per_token_logps_and_entropies(model, *args, **{**kwargs, "compute_entropy": True})
        self._watched = found[:2]
        return found[0], None, found[2]

    def _statistics(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the completions' tokens [B, T]."""
        watched, self._watched = self._watched, None
        # With an adapter the first forward may be the reference model's: the same model, its adapter off.
        if watched is not None and watched[0] is batch.get("old_per_token_logps"):
            return watched
        ids, mask = (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1) for name in ("ids", "mask"))
        size = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        extra = {name: batch[name] for name in EXTRA_INPUTS if name in batch}
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logprobs, entropy, _ = super()._get_per_token_logps_and_entropies(
                self.model, ids, mask, batch["completion_ids"].shape[1], batch_size=size, compute_entropy=True, **extra
            )
        return logprobs, entropy

    def _features(self, batch: dict[str, Any], logprobs: Tensor, entropy: Tensor) -> tuple[CompletionFeatures, Tensor]:
        """-> features [B], and whether the answer was found. What a tool wrote counts nowhere."""
        ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
        if "tool_mask" in batch:
            mask = mask & batch["tool_mask"].bool()
        start = self._answer_start(ids, mask)
        options: dict[str, Any] = {"top_m": self.top_m, "no_answer": self.args.no_answer}
        features = completion_features(entropy, logprobs, completion_mask=mask, answer_start=start, **options)
        return features, start >= 0

    def _answer_start(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B] int64, -1 where no answer was found."""
        marker = self.args.answer_marker
        if marker is None:
            return torch.full_like(ids[:, 0], -1)
        if isinstance(marker, str) or isinstance(marker[0], str):
            texts = [marker] if isinstance(marker, str) else marker
            return torch.tensor(
                [*_answers_in_text(self._tokenizer, ids, mask, texts, self.eos_token_ids)],
                dtype=torch.int64,
                device=ids.device,
            )
        start = answer_start(ids, marker, completion_mask=mask)
        first = ids.gather(1, start.clamp(0, ids.shape[1] - 1)[:, None])[:, 0]
        ends = torch.tensor(self.eos_token_ids, dtype=ids.dtype, device=ids.device)
        return torch.where(torch.isin(first, ends), -1, start)  # an end token right after the marker: no answer

    def _log_scores(self, rewards_per_func: Tensor, rewards: Tensor, advantages: Tensor, group_size: int) -> None:
        """Writes what TRL's metrics and table of completions say of scores that it did not have yet."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        scores = rewards_per_func[:, self._score_column]
        name = self.reward_func_names[self._score_column]
        for key, values in ((f"rewards/{name}/", scores), ("reward", rewards)):
            known = values[~values.isnan()]
            mean, deviation = ("mean", "std") if key.endswith("/") else ("", "_std")
            metrics[key + mean][-1] = known.mean().item()
            metrics[key + deviation][-1] = known.std().item() if len(known) > 1 else torch.nan
        moving = advantages.view(-1, group_size).any(1)
        metrics["frac_reward_zero_std"][-1] = 1.0 - moving.float().mean().item()
        logs: dict[str, Any] = self._logs
        for log, values in ((logs["rewards"][name], scores), (logs["advantages"], advantages)):
            for _ in range(min(len(log), len(values))):
                log.pop()
            log.extend(values.tolist())


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _score_and_top_m(args: SEGAConfig) -> tuple[LinearScore, float | int]:
    if isinstance(args.score, LinearScore):
        return args.score, args.top_m or TOP_M
    assert args.score is not None
    if args.score == "paper":
        weights = {"final_entropy": -args.final_weight, "fork_entropy": args.fork_weight}
        return LinearScore(weights), args.top_m or TOP_M
    found = read_score_file(args.score)
    if args.top_m not in (None, found.top_m):
        arguments.fail("top_m", f"left out, or that of {args.score}, {found.top_m}", args.top_m)
    if found.doubts:
        warnings.warn(f"score: {args.score}: {found.doubts}", stacklevel=3)
    if args.temperature != 1.0:
        words = f"was fitted to entropies at temperature 1.0 (gem's default), this run has {args.temperature}"
        warnings.warn(f"score: {args.score} {words}", stacklevel=3)
    return found.linear, found.top_m


def _check_marker(marker: Any) -> None:
    """None, a text, token ids, or several of either."""
    several = marker if isinstance(marker, (list, tuple)) else [marker]
    texts = all(isinstance(x, str) and x.strip() for x in several)
    ids = all(isinstance(x, int) or (isinstance(x, (list, tuple)) and x) for x in several)
    if marker is not None and not (several and (texts or ids)):
        arguments.fail("answer_marker", "a text, token ids, several of either, or None", arguments.shown(marker))


def _answers_in_text(
    tokenizer: Any, ids: Tensor, mask: Tensor, markers: Sequence[str], end_tokens: Sequence[int]
) -> list[int]:
    """The token that holds the first character after the last marker that is not white space, -1 where there is none.

    A tokenizer may put the marker's end and the answer's beginning into one token, so this looks at the text: the
    shortest beginning of the completion that reaches the answer is found by bisection. Of a completion with a tool's
    output, the tokens after it.
    """
    lengths = (mask * torch.arange(1, ids.shape[1] + 1, dtype=torch.int64, device=ids.device)).amax(1)
    found, rows, firsts = [-1] * len(ids), [], []
    for row, counted, length in zip(ids.tolist(), mask.tolist(), lengths.tolist()):
        holes = [i for i in range(length) if not counted[i]]
        firsts.append(holes[-1] + 1 if holes else 0)
        rows.append(row[firsts[-1] : length - (1 if length and row[length - 1] in end_tokens else 0)])

    def decode(rows: list[list[int]]) -> list[str]:
        return tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    places, texts = {}, decode(rows)
    for i, text in enumerate(texts):
        after = max((text.rfind(marker) + len(marker) for marker in markers if marker in text), default=len(text))
        rest = text[after:]
        if rest.strip():
            places[i] = len(text) - len(rest.lstrip())
    low, high = dict.fromkeys(places, 0), {i: len(rows[i]) for i in places}
    while left := [i for i in places if low[i] < high[i]]:
        middles = [(low[i] + high[i]) // 2 for i in left]
        for i, middle, text in zip(left, middles, decode([rows[i][:middle] for i, middle in zip(left, middles)])):
            if text.startswith(texts[i][: places[i]]):
                high[i] = middle
            else:
                low[i] = middle + 1
    for i, text in zip(places, decode([rows[i][: high[i]] for i in places])):
        found[i] = firsts[i] + high[i] - (len(text) > places[i])
    return found

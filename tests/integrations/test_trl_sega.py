"""SEGATrainer: its advantages are gem's on the same completions, its gradients gem_kernels', and all else is TRL's."""

from __future__ import annotations

import inspect
import json
import runpy
import warnings
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from gem.config.settings import Scoring  # noqa: E402
from gem.model.forward import Policy  # noqa: E402
from gem.rollout.sample import given_completions  # noqa: E402
from gem.run.metrics import rollout_metrics  # noqa: E402
from gem.scoring.score import score_rollout  # noqa: E402
from gem_kernels import LinearScore, group_advantages, sega_loss  # noqa: E402
from gem_kernels.integrations import trl_sega  # noqa: E402
from gem_kernels.integrations.trl import use_gem_kernels  # noqa: E402
from gem_kernels.integrations.trl_sega import SEGAConfig, SEGATrainer  # noqa: E402
from tests.helpers import END, FORM, TOKENIZER, encode, save_tiny, tiny_model, tiny_tokenizer  # noqa: E402
from tests.processes import run_ranks  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient checkpointing.*"),
]

PROMPTS = ["two plus two?", "and three?"]
TEXTS = [
    "2 + 2 = 4\nFinal Answer: 4", "Final Answer:\n5", "hm", "so it is Final Answer: 12",
    "no", "x\nFinal Answer: 1", "Final Answer:", "Final Answer: 3 no Final Answer: 4!!",
]  # fmt: skip
CALIBRATED = LinearScore({"final_entropy": -0.4, "mean_logprob": 1.5}, {"mean_logprob": 0.3})
SETTINGS = {
    "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 12, "max_steps": 2,
    "logging_steps": 1, "disable_tqdm": True, "gradient_checkpointing": False, "learning_rate": 0.1, "optim": "sgd",
    "max_grad_norm": 0.0, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "seed": 3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="trl|transformers|torch|peft|accelerate")
        yield


class Given(SEGATrainer):
    """Its completions are those of TEXTS; the third is cut off."""

    def _generate_single_turn(self, prompt_ids, *_, **__):
        rank, n = self.accelerator.process_index, len(prompt_ids)
        return [given_ids(i % len(TEXTS)) for i in range(rank * n, (rank + 1) * n)], None


def given_ids(i):
    return [*encode(TEXTS[i]), *([] if i == 2 else [END])]


def trainer_of(folder, cls=Given, model=None, config=SEGAConfig, reward_funcs=None, lora=False, **settings):
    given = {"train_dataset": datasets.Dataset.from_dict({"prompt": PROMPTS * 2}), "processing_class": tiny_tokenizer()}
    if lora:
        given["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    args = config(str(folder), **{**SETTINGS, **settings})
    return cls(model or tiny_model(), reward_funcs=reward_funcs, args=args, **given)


def rows_of(n=8):
    """As TRL's sampler repeats them."""
    return [{"prompt": PROMPTS[i * 2 // 8]} for i in range(n)]


def generate(trainer, rows=None):
    trainer.model.train()
    return trainer._generate_and_score_completions(rows or rows_of())


def scored_by_gem(model, linear=None, **scoring):
    prompts = [tuple(TOKENIZER(text)["input_ids"]) for text in PROMPTS]
    rollout = given_completions(FORM, prompts, [given_ids(i) for i in range(8)])
    return score_rollout(
        Policy(model), rollout, Scoring(max_completion_length=99, **scoring), linear=linear, batch_size=2
    )


def assert_near(found, wanted):
    wanted = torch.as_tensor(wanted, dtype=found.dtype)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max().clamp(min=0.1), (found, wanted)


CASES = {
    "paper": ({}, {}),
    "weights": (
        {"final_weight": 0.5, "fork_weight": 2.0, "top_m": 3}, {"final_weight": 0.5, "fork_weight": 2.0, "top_m": 3},
    ),
    "calibrated": ({"score": CALIBRATED}, {"linear": CALIBRATED}),
    "rank": (
        {"reward_mapping": "rank", "scale_rewards": "group"}, {"reward_mapping": "rank", "reward_scale": "group"},
    ),
    "exclude": ({"no_answer": "exclude"}, {"no_answer": "exclude"}),
    "truncated": (
        {"mask_truncated_completions": True, "reward_mapping": "softmax"},
        {"mask_truncated": True, "reward_mapping": "softmax"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_advantages_are_gem_s(case, tmp_path):
    """With old log-probs (`num_iterations`), whose forward is used again, and without, where one is added."""
    ours, gem_s = CASES[case]
    wanted = scored_by_gem(tiny_model(), **gem_s)
    assert wanted.advantages.abs().max() > 0.01
    for iterations in (1, 2):
        trainer = trainer_of(tmp_path, **ours, num_iterations=iterations)
        calls = []
        trainer.model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        output = generate(trainer)
        assert len(calls) == 1 and ("old_per_token_logps" in output) == (iterations == 2)
        assert_near(output["advantages"], wanted.advantages)
        metrics, theirs = trainer._metrics["train"], rollout_metrics(wanted)
        names = ["reward", "gem/score", "gem/h_final", "gem/h_fork", "gem/answer_span_found", "gem/valid"]
        names.append("frac_reward_zero_std")
        for name in names:
            assert metrics[name] == [pytest.approx(theirs[name], rel=1e-4, abs=1e-5)], name
        assert metrics["rewards/entropy_score/mean"] == [pytest.approx(theirs["gem/score"], rel=1e-4, abs=1e-5)]
        assert_near(torch.tensor(trainer._logs["advantages"]), wanted.advantages)
        shown = torch.tensor(trainer._logs["rewards"]["entropy_score"])
        assert_near(shown[wanted.scores.valid], wanted.scores.score[wanted.scores.valid])
        assert shown[~wanted.scores.valid].isnan().all()


def test_the_adapter_s_reference_is_not_scored(tmp_path):
    """With KL and LoRA the first forward is that of the base model: the same module, its adapter off."""
    trainer = trainer_of(tmp_path, lora=True, beta=0.1)
    output = generate(trainer)
    wanted = scored_by_gem(trainer.model)
    assert "ref_per_token_logps" in output and "old_per_token_logps" not in output
    assert_near(output["advantages"], wanted.advantages)
    with trainer.model.disable_adapter():
        other = scored_by_gem(trainer.model).advantages
    assert (other - wanted.advantages).abs().max() > 0.01


@pytest.mark.parametrize(
    "loss_type,theirs", [("sum", "luspo"), ("mean", "grpo"), ("token", "dapo"), ("constant", "dr_grpo")]
)
def test_a_step_is_sega_s(loss_type, theirs, tmp_path):
    """TRL's loss types have the gradients of `sega_loss`."""
    trainer = trainer_of(tmp_path, loss_type=theirs, max_steps=1, lr_scheduler_type="constant")
    with use_gem_kernels():
        batch = generate(trainer)
        trainer.current_gradient_accumulation_steps = 1
        trainer.compute_loss(trainer.model, batch).backward()
    model = tiny_model()
    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    T = batch["completion_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -T - 1 : -1]
    loss = sega_loss(
        logits, batch["completion_ids"], completion_mask=batch["completion_mask"].bool(), group_size=4,
        answer_start=torch.zeros(8, dtype=torch.int64), advantages=batch["advantages"], loss_type=loss_type,
        max_completion_length=12,
    )  # fmt: skip
    loss.loss.backward()
    for (name, a), b in zip(model.named_parameters(), trainer.model.parameters()):
        assert (a.grad - b.grad).norm() <= 1e-3 * a.grad.norm(), name


def test_images_reach_the_forward(tmp_path, monkeypatch):
    """What a multimodal model needs beside the tokens, of TRL's batch, goes where TRL's own loss gives it."""
    trainer, given = trainer_of(tmp_path), []
    ids = torch.tensor([given_ids(0)])
    batch = {f"{part}_{x}": ids for part in ("prompt", "completion") for x in ("ids", "mask")}
    extra = dict.fromkeys(trl_sega.EXTRA_INPUTS, 7)

    def forward(self, *args, **kwargs):
        given.append(kwargs)
        return ids, ids, None

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", forward)
    trainer._statistics(batch | extra | {"advantages": ids})
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert [name for name in extra if f'{name}=inputs.get("{name}")' in source] == list(extra)
    assert {name: given[0][name] for name in extra} == extra and given[0]["compute_entropy"]


def shortness(completions, **_):
    return [None if i == 1 else -float(len(text)) for i, text in enumerate(completions)]


def test_rewards_are_added(tmp_path):
    trainer = trainer_of(tmp_path, reward_funcs=shortness, reward_weights=[0.5], score_weight=2.0, no_answer="exclude")
    assert trainer.args.reward_weights == [0.5] and trainer.reward_weights.tolist() == [0.5, 2.0]
    output = generate(trainer)
    scores = scored_by_gem(tiny_model(), no_answer="exclude").scores
    lengths = torch.tensor([0.0 if i == 1 else -float(len(text)) for i, text in enumerate(TEXTS)])
    rewards = 2.0 * scores.score + 0.5 * lengths
    assert_near(output["advantages"], group_advantages(rewards, 4, valid=scores.valid))
    metrics = trainer._metrics["train"]
    assert metrics["reward"] == [pytest.approx(float(rewards[scores.valid].mean()), rel=1e-4)]
    assert metrics["rewards/shortness/mean"] == [pytest.approx(float(lengths.sum()) / 7, rel=1e-4)]
    assert not output["advantages"][~scores.valid].any() and not scores.valid.all()


def test_what_a_tool_wrote_is_not_scored(tmp_path):
    trainer = trainer_of(tmp_path)
    ids = torch.tensor([given_ids(0)])
    batch = {"completion_ids": ids, "completion_mask": torch.ones_like(ids), "tool_mask": torch.ones_like(ids)}
    batch["tool_mask"][0, 3:6] = 0
    entropy = torch.rand(ids.shape)
    one, found = trainer._features(batch, -entropy, entropy)
    entropy[0, 3:6] = 99.0
    two, _ = trainer._features(batch, -entropy, entropy)
    assert found.all() and one.length == ids.shape[1] - 3
    assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("max_entropy", "final_entropy"))


@pytest.mark.parametrize(
    "marker,found",
    [("Final Answer:", [0, 1, 3, 5, 7]), (None, []), (list(encode("Answer")), [0, 1, 3, 5, 6, 7]), (["hm", "no"], [7])],
    ids=["text", "none", "ids", "texts"],
)
def test_markers(marker, found, tmp_path):
    trainer = trainer_of(tmp_path, answer_marker=marker)
    ids = [torch.tensor(given_ids(i)) for i in range(8)]
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=TOKENIZER.pad_token_id)
    mask = (ids != TOKENIZER.pad_token_id).long()
    batch = {"completion_ids": ids, "completion_mask": mask}
    _, where = trainer._features(batch, torch.zeros(ids.shape), torch.zeros(ids.shape))
    assert where.nonzero()[:, 0].tolist() == found


# Training: TRL's own sampling.


def logs(trainer, *names):
    """Of the steps that sampled."""
    return [[entry[name] for name in names] for entry in trainer.state.log_history if "gem/score" in entry]


@pytest.mark.parametrize(
    "settings",
    [
        {"lora": True, "gradient_checkpointing": True},
        {"num_iterations": 2, "beta": 0.05, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"cast_lm_head_to_fp32": True, "bf16": True, "log_completions": True},
    ],
    ids=["peft-checkpointing", "iterations-kl", "bf16-fp32-head"],
)
def test_it_trains(settings, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "model"))
    trainer = trainer_of(tmp_path, SEGATrainer, model, **settings)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    with use_gem_kernels():
        trainer.train()
    found = logs(trainer, "loss", "gem/score", "gem/h_final", "gem/h_fork", "gem/valid", "reward")
    assert len(found) == 2 // trainer.num_iterations and trainer.state.global_step == 2
    assert all(row[-2] == 1.0 and abs(row[-1] - row[1]) < 1e-5 for row in found)
    assert any(not torch.equal(p, start[name]) for name, p in trainer.model.named_parameters() if name in start)
    if "log_completions" in settings:
        table = datasets.Dataset.from_parquet(str(tmp_path / "completions" / "completions_00002.parquet"))
        assert any(table["advantage"]) and any(table["entropy_score"])


def test_an_moe_model_keeps_its_auxiliary_loss(tmp_path):
    shape = tiny_model().config.to_dict()
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "eos_token_id",
    )
    small = {"per_device_train_batch_size": 2, "num_generations": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "output_router_logits": True}
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**{name: shape[name] for name in names}, **experts, initializer_range=0.3)
    trainer = trainer_of(tmp_path, SEGATrainer, transformers.MixtralForCausalLM(config), max_steps=1, **small)
    trainer.train()
    ((loss, aux, score),) = logs(trainer, "loss", "aux_loss", "gem/score")
    assert aux > 0 and score != 0 and loss == loss


def test_evaluation(tmp_path):
    trainer = trainer_of(tmp_path, SEGATrainer, per_device_eval_batch_size=4)
    found = trainer.evaluate(datasets.Dataset.from_dict({"prompt": PROMPTS}))
    assert {"eval_loss", "eval_gem/score", "eval_gem/h_final", "eval_reward"} <= found.keys()


def test_resume(tmp_path):
    """From TRL's checkpoint: the rest of the run is that of one that was not stopped."""
    settings = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    whole = trainer_of(tmp_path, SEGATrainer, **settings)
    whole.train()
    again = trainer_of(tmp_path, SEGATrainer, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    names = ("loss", "reward", "gem/score", "gem/h_fork")
    assert len(logs(again, *names)) == 2 and logs(again, *names)[-1] == pytest.approx(logs(whole, *names)[-1], rel=1e-5)
    for a, b in zip(whole.model.parameters(), again.model.parameters()):
        assert (a - b).norm() <= 1e-5 * a.norm()
    assert "SEGA" in (tmp_path / "README.md").read_text()


def advantages_of_this_process(folder):
    warnings.filterwarnings("ignore")
    # Two groups of four: the first process has three of the first group's four.
    trainer = trainer_of(folder, per_device_train_batch_size=4)
    rank = trainer.accelerator.process_index
    output = generate(trainer, rows_of()[rank * 4 :][:4])
    metrics = {name: found for name, found in trainer._metrics["train"].items() if name.startswith(("gem/", "rew"))}
    (folder / f"rank{rank}.json").write_text(json.dumps([output["advantages"].tolist(), metrics]))


def test_two_processes_have_the_advantages_of_one(tmp_path):
    run_ranks(2, advantages_of_this_process, tmp_path, environment={"GLOO_SOCKET_IFNAME": "lo"})
    (one, metrics), (two, others) = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    trainer = trainer_of(tmp_path)
    wanted = generate(trainer)
    assert_near(torch.tensor(one + two), wanted["advantages"])
    assert metrics == others and len(metrics) >= 8
    for name, values in metrics.items():
        assert values == pytest.approx(trainer._metrics["train"][name], rel=1e-4), name


# What is refused.


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"score": 3}, "`score` must be 'paper'"),
        ({"score": "none.json"}, "none.json: cannot read it"),
        ({"score": CALIBRATED, "fork_weight": 2.0}, "left out where `score` is not 'paper'"),
        ({"answer_marker": []}, "`answer_marker` must be a text"),
        ({"answer_marker": ["a", 3]}, "`answer_marker` must be a text"),
        ({"no_answer": "skip"}, "`no_answer` must be one of"),
        ({"top_m": 1.5}, "`top_m` must be"),
        ({"reward_mapping": "log"}, "`reward_mapping` must be one of"),
        ({"scale_rewards": "batch"}, "`scale_rewards` must be one of 'none', 'group'"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "`multi_objective_aggregation` must be"),
        ({"final_weight": float("nan")}, "`final_weight` must be"),
        ({"reward_weights": [1.0]}, "`reward_weights` must be one for each of the 0 reward_funcs"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_settings(settings, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        trainer_of(tmp_path, **settings)


def test_another_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`args` must be a SEGAConfig, got GRPOConfig"):
        SEGATrainer(tiny_model(), args=GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_another_trl_is_refused(monkeypatch):
    trl_sega.check_trl()
    monkeypatch.setattr(GRPOTrainer, "_calculate_rewards", lambda self, inputs: None)
    with pytest.raises(ValueError, match=r"must be of version 1\.16, whose .*_calculate_rewards .*\(self, inputs\)"):
        trl_sega.check_trl()
    monkeypatch.delattr(GRPOTrainer, "_calculate_rewards")
    with pytest.raises(ValueError, match="without it"):
        trl_sega.check_trl()


def test_settings_from_files_and_flags(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--top_m", "4", "--no_answer", "exclude"]
    (args,) = trl.TrlParser(SEGAConfig).parse_args_and_config(
        [*flags, "--score", '{"weights": {"mean_logprob": 2.0}}', "--answer_marker", "####"]
    )
    assert args.top_m == 4 and isinstance(args.top_m, int) and args.no_answer == "exclude"
    assert args.score == LinearScore({"mean_logprob": 2.0}) and args.answer_marker == "####"
    assert json.loads(args.to_json_string())["score"] == {"weights": {"mean_logprob": 2.0}, "scales": {}}
    assert args.scale_rewards == "none"


def score_file(folder, **more):
    content = {
        "kind": "gem-score", "version": 1, "weights": dict(CALIBRATED.weights), "scales": {"mean_logprob": 0.3},
        "top_m": 0.2, "verdict": {"kind": "not_informative", "words": "No better than chance."}, **more,
    }  # fmt: skip
    path = folder / "score.json"
    path.write_text(json.dumps(content))
    return path


def test_a_score_file(tmp_path):
    path = score_file(tmp_path)
    args = SEGAConfig(str(tmp_path), score=str(path), temperature=0.7, use_cpu=True, bf16=False)
    with pytest.warns(UserWarning) as caught:
        assert trl_sega._score_and_top_m(args) == (CALIBRATED, 0.2)
    words = [str(one.message) for one in caught]
    assert any("No better than chance." in w for w in words) and any("this run has 0.7" in w for w in words)
    args = SEGAConfig(str(tmp_path), score=str(path), top_m=0.1, use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=r"`top_m` must be left out, or that of .*score.json, 0\.2, got 0\.1"):
        trl_sega._score_and_top_m(args)


def test_the_example_runs(tmp_path):
    main = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "trl_sega.py"))["main"]
    settings = {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 3, "max_steps": 1}
    settings |= {"use_cpu": True, "bf16": False, "disable_tqdm": True}
    path = score_file(tmp_path, verdict={"kind": "informative", "words": ""})
    model = save_tiny(tmp_path / "model", context=1024)
    trainer = main(str(model), str(path), str(tmp_path / "out"), **settings)
    assert len(logs(trainer, "gem/score")) == 1 and trainer.linear_score == CALIBRATED

"""The code that docs/integrations.md shows runs as it stands, and gives the numbers of plain torch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.kernels.helpers import assert_near

TEXT = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
# Run with stand-ins for the trainers, which are not installed here: tests/integrations/test_others.py.
OTHERS = {"openrlhf", "prime_rl"}
BLOCKS = dict(re.findall(r"```python (\w+)\n(.*?)```", TEXT, flags=re.DOTALL))
V = 67


@pytest.fixture
def names():
    """What the page takes as given: two sequences of 12 tokens, the last 5 of them counted, 3 in the second one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    input_ids = torch.randint(3, V, (2, 12))
    labels = input_ids.clone()
    labels[:, :7] = -100
    labels[1, 10:] = -100
    shape = (2, 11)
    return {
        "torch": torch, "model": model, "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids),
        "labels": labels, "num_tokens": 8, "mask": (labels[:, 1:] != -100).float(),
        "old": -4 + torch.rand(shape), "ref": -4 + torch.rand(shape), "advantages": torch.randn(shape),
    }  # fmt: skip


def plain(names, temperature=1.0):
    """logprobs and entropy of every token by torch, zero where it does not count."""
    logits = names["model"](names["input_ids"]).logits[:, :-1] / temperature
    logp = F.log_softmax(logits, -1)
    counted = names["labels"][:, 1:] != -100
    chosen = logp.gather(-1, names["labels"][:, 1:].clamp_min(0)[..., None])[..., 0]
    return torch.where(counted, chosen, 0.0), torch.where(counted, -(logp.exp() * logp).sum(-1), 0.0)


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_every_block_is_run_here():
    assert set(BLOCKS) == {
        "logits",
        "model",
        "policy",
        "mixed",
        "sharded",
        "trl",
        "sega",
        "logits_dtype",
        "scores",
        "starts",
        *OTHERS,
    }


@pytest.mark.parametrize("block", ["logits", "model", "policy"])
def test_a_loss_and_its_gradients(block, names):
    model = names["model"]
    logprobs, entropy = plain(names, 0.7 if block == "logits" else 1.0)
    if block == "logits":
        names["logits"] = model(names["input_ids"]).logits
        truth = -(logprobs * names["advantages"]).sum() - 0.01 * entropy.sum()
    elif block == "model":
        truth = -logprobs.sum() / 8
    else:
        ratio = (logprobs - names["old"]).exp()
        surrogate = torch.minimum(ratio * names["advantages"], ratio.clamp(0.8, 1.28) * names["advantages"])
        kl = (names["ref"] - logprobs).exp() - (names["ref"] - logprobs) - 1
        truth = -(names["mask"] * (surrogate - 0.04 * kl)).sum() / 8
    expected = gradients(truth, model)
    model.zero_grad()
    exec(BLOCKS[block], names)
    loss = names["out"].loss if block == "policy" else names["loss"]
    # The sums cancel: relative to the size of a log-prob.
    assert_near(loss, truth, floor=float(logprobs.detach().abs().max()))
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, p in model.named_parameters():
        assert_near(p.grad, expected[name], 2.0**-14, name, floor=1e-3 * largest)


def test_mixed():
    names = {"torch": torch, "hidden": torch.randn(5, 8).bfloat16(), "targets": torch.arange(5)}
    names["weight"] = torch.randn(20, 8, requires_grad=True)
    exec(BLOCKS["mixed"], names)
    logp = (names["hidden"] @ names["weight"].detach().bfloat16().t()).float().log_softmax(-1)
    assert_near(names["stats"].logprobs, logp.diagonal())


def test_sharded():
    """A group of one."""
    names = {"hidden": torch.randn(5, 8), "targets": torch.arange(5), "starts": (0, 20)}
    names["my_rows_of_the_weight"] = torch.randn(20, 8)
    names["my_columns_of_the_logits"] = logits = names["hidden"] @ names["my_rows_of_the_weight"].t()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        names["group"] = dist.group.WORLD
        exec(BLOCKS["sharded"].replace("stats = token_stats", "more = token_stats"), names)
    finally:
        dist.destroy_process_group()
    want = logits.log_softmax(-1).diagonal()
    assert_near(names["stats"].logprobs, want)
    assert_near(names["more"].logprobs, want)


def test_logits_dtype():
    """Within float32 of float64 on bfloat16 inputs, where bfloat16 logits are not."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 9, 64, generator=generator).bfloat16()
    weight = torch.randn(301, 64, generator=generator).mul(0.4).bfloat16()
    ids = torch.randint(0, 301, (1, 9), generator=generator)
    names = {"hidden": hidden, "weight": weight, "input_ids": ids}
    exec(BLOCKS["logits_dtype"], names)
    logp = (hidden.double() @ weight.double().t() / 0.7).log_softmax(-1)
    exact = (logp.gather(-1, ids[..., None])[..., 0].float(), -(logp.exp() * logp).sum(-1).float())
    for got, want in zip((names["stats"].logprobs, names["stats"].entropy), exact):
        assert_near(got, want, 2.0**-20)
    rounded = names["linear_token_stats"](hidden, weight, ids, temperature=0.7)
    assert (rounded.logprobs - exact[0]).abs().max() > 2.0**-10


def test_scores(names):
    names |= {"entropy": torch.rand(4, 9), "mask": torch.ones(4, 9, dtype=torch.bool)}
    names["answer_start"] = torch.tensor([6, 7, 5, 9])
    exec(BLOCKS["scores"], names)
    first = names["entropy"][0]
    assert float(names["scores"].score[0]) == pytest.approx(float(first[:6].max() - first[6:].mean()), rel=1e-5)
    assert float(names["advantages"].sum()) == pytest.approx(0.0, abs=1e-5)


def test_starts(names):
    class Tokenizer:
        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return {"####": [9], " ####": [8, 9], "\n####": [7, 9]}[text]

    ids = torch.tensor([[1, 9, 3, 4], [1, 2, 3, 4], [8, 9, 9, 2]])
    names |= {"tokenizer": Tokenizer(), "completion_ids": ids, "completion_mask": torch.ones_like(ids)}
    names |= {"rewards": torch.tensor([1.0, 5.0, 3.0]), "prompt_ids": torch.tensor([4, 7, 4])}
    exec(BLOCKS["starts"], names)
    assert names["start"].tolist() == [2, -1, 3]
    assert names["advantages"].tolist() == [-1.0, 0.0, 1.0]


def test_trl(names, tmp_path):
    """The block trains, with this package's head; and TRL's own is back afterwards."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from gem_kernels.integrations import trl as integration
    from tests.integrations.tiny import tiny_tokenizer

    own, calls = trl.trainer.utils._ChunkedLogProbFunction, []

    def reward(completions, **_):
        calls.append(isinstance(trl.trainer.utils._ChunkedLogProbFunction, integration.Ours))
        return [float(len(text)) for text in completions]

    names |= {"reward_funcs": reward, "tokenizer": tiny_tokenizer(V)}
    names["dataset"] = datasets.Dataset.from_dict({"prompt": ["w1 w2 w3", "w4 w5 w6"]})
    names["config"] = trl.GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, num_generations=2, max_completion_length=4,
        max_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, learning_rate=0.1,
    )  # fmt: skip
    before = names["model"].lm_head.weight.detach().clone()
    exec(BLOCKS["trl"], names)
    assert calls == [True] and trl.trainer.utils._ChunkedLogProbFunction is own
    assert not torch.equal(before, names["trainer"].model.lm_head.weight.detach().cpu())


def test_sega(names, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("trl")
    from tests.integrations.tiny import tiny_tokenizer

    monkeypatch.chdir(tmp_path)
    names |= {"tokenizer": tiny_tokenizer(V), "dataset": datasets.Dataset.from_dict({"prompt": ["w1 w2", "w4 w5"]})}
    names["settings"] = {
        "per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 4, "max_steps": 1,
        "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 1,
    }  # fmt: skip
    exec(BLOCKS["sega"], names)
    assert "gem/score" in names["trainer"].state.log_history[0]

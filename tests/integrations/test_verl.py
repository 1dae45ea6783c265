"""verl's adapter against a stand-in with the parameters it is written for; the stand-in computes nothing but `own`.

`python -m tests.integrations.others verl` runs it against verl itself.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gem_kernels import entropy_scores, group_advantages
from gem_kernels.integrations import verl
from gem_kernels.integrations.swap import Ours
from tests.integrations.tiny import UIDS, V, batch, exact
from tests.kernels.helpers import assert_near

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake_verl(stand_in):
    class FusedLinearForPPO(torch.nn.Module):
        def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
            return "own"

    def logprobs_from_logits(logits, labels, inplace_backward=True):
        return "own"

    def entropy_from_logits(logits):
        return "own"

    def entropy_from_logits_with_chunking(logits, chunk_size=2048):
        return "own"

    def register_adv_est(name_or_enum):
        return lambda function: registry.setdefault(name_or_enum, function)

    registry: dict = {}
    stand_in("verl", __version__="0.9.1")
    helpers = stand_in(
        verl.HELPERS, logprobs_from_logits=logprobs_from_logits, entropy_from_logits=entropy_from_logits,
        entropy_from_logits_with_chunking=entropy_from_logits_with_chunking,
    )  # fmt: skip
    heads = stand_in(verl.HEADS, FusedLinearForPPO=FusedLinearForPPO)
    engine = stand_in("verl.workers.engine", logprobs_from_logits=logprobs_from_logits)
    algorithms = stand_in(verl.ALGORITHMS, register_adv_est=register_adv_est)
    return SimpleNamespace(helpers=helpers, heads=heads, engine=engine, algorithms=algorithms, registry=registry)


def test_verl_the_head_and_the_helpers(fake_verl, tensors):
    with verl.use_gem_kernels():
        with verl.use_gem_kernels():  # within it: nothing more
            pass
        head = fake_verl.heads.FusedLinearForPPO()
        found = head(tensors.hidden, tensors.weight, tensors.targets, temperature=0.7)
        for x, y in zip(found, exact(tensors.logits / 0.7, tensors.targets)):
            assert_near(x, y)
        logprobs = fake_verl.engine.logprobs_from_logits(logits=tensors.logits, labels=tensors.targets)
        want = exact(tensors.logits, tensors.targets)
        assert_near(logprobs, want[0])
        assert_near(fake_verl.helpers.entropy_from_logits(tensors.logits), want[1])
        assert_near(fake_verl.helpers.entropy_from_logits_with_chunking(tensors.logits, chunk_size=3), want[1])
        # verl's own: float64, another dtype of the weight, strided rows
        assert head(tensors.hidden, tensors.weight.bfloat16(), tensors.targets) == "own"
        assert fake_verl.helpers.entropy_from_logits(tensors.logits.double()) == "own"
        strided = tensors.logits.transpose(0, 2)
        assert fake_verl.engine.logprobs_from_logits(strided, torch.zeros(V, 5, dtype=torch.int64)) == "own"
    assert not isinstance(fake_verl.engine.logprobs_from_logits, Ours)
    assert fake_verl.heads.FusedLinearForPPO()(tensors.hidden, tensors.weight, tensors.targets) == "own"


def test_verl_writes_over_the_logits_only_where_told(fake_verl, tensors):
    gradients = []
    with verl.use_gem_kernels():
        for options in ({}, {"inplace_backward": True}):
            leaf = tensors.logits.clone().requires_grad_()
            given = leaf * 1
            fake_verl.helpers.logprobs_from_logits(given, tensors.targets, **options).sum().backward()
            gradients.append(leaf.grad)
            assert torch.equal(given, tensors.logits) is not bool(options)
    assert_near(gradients[1], gradients[0])


def test_another_verl_is_refused(fake_verl, monkeypatch):
    monkeypatch.setattr(fake_verl.helpers, "entropy_from_logits", lambda logits, dim: None)
    with pytest.raises(ValueError, match=r"`verl` must be of version 0\.9, whose .*entropy_from_logits .*0\.9\.1.*dim"):
        verl.use_gem_kernels()
    monkeypatch.delattr(fake_verl.heads, "FusedLinearForPPO")
    with pytest.raises(ValueError, match="without it"):
        verl.use_gem_kernels()
    assert not isinstance(fake_verl.helpers.logprobs_from_logits, Ours)


def test_a_trainer_that_lacks_something(stand_in, monkeypatch):
    stand_in("verl")
    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name="ray")))
    with pytest.raises(ValueError, match="got one that does not find its ray"):
        verl.use_gem_kernels()


@pytest.mark.parametrize("named", ["", "auto", "other", "other, gem_kernels"])
def test_the_plugin_of_verl_waits_until_it_is_named(fake_verl, named, monkeypatch):
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", named)
    (entry,) = [x for x in entry_points(group="verl.plugins") if x.name == "gem_kernels"] or [None]
    path = "gem_kernels.integrations.verl_plugin"
    assert entry is None or entry.value == path  # None where this clone was installed before it had one
    swaps = []
    monkeypatch.setattr(verl, "use_gem_kernels", lambda: swaps.append(1))
    runpy.run_module(path)
    assert bool(swaps) is bool(fake_verl.registry) is named.endswith("gem_kernels")


def test_the_plugin_of_verl_says_what_is_wrong(fake_verl, monkeypatch, caplog):
    """verl itself keeps it to itself."""
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "gem_kernels")
    monkeypatch.delattr(fake_verl.helpers, "entropy_from_logits")
    with pytest.raises(ValueError):
        runpy.run_module("gem_kernels.integrations.verl_plugin")
    assert "gem_kernels is not in use: `verl` must be of version 0.9" in caplog.text


def test_the_entry_point_is_the_plugin():
    tomllib = pytest.importorskip("tomllib")
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert groups == {"verl.plugins": {"gem_kernels": "gem_kernels.integrations.verl_plugin"}}
    assert importlib.util.find_spec("gem_kernels.integrations.verl_plugin")


def test_verl_s_estimator_gives_the_advantages_of_this_package(fake_verl):
    entropy, mask, start = batch()
    verl.register_sega()
    estimator = fake_verl.registry["sega"]
    config = {"sega": {"fork_weight": 0.5, "top_m": 1, "scale": "group"}}
    with verl.stored(verl.Stored(entropy, start)) as shown:
        found, returns = estimator(token_level_rewards=mask * 0.0, response_mask=mask, index=UIDS, config=config)
    scores = entropy_scores(entropy, completion_mask=mask, answer_start=start, fork_weight=0.5, top_m=1)
    want = group_advantages(scores.score, valid=scores.valid, group_ids=torch.tensor([0, 1, 0, 1, 0]), scale="group")
    assert_near(found, want[:, None] * mask)
    assert returns is found and want[0] != 0 and want[3] == 0
    assert shown.metrics["gem/valid"] == pytest.approx(0.8)
    assert shown.metrics["gem/score"] == pytest.approx(float(scores.score.sum() / 4))
    alone, _ = verl.sega_advantages(mask * 0.0, mask, UIDS, config, entropy=entropy, answer_start=start)
    assert torch.equal(alone, found)


def test_verl_s_estimator_says_what_is_missing():
    entropy, mask, _ = batch()
    with pytest.raises(ValueError, match=r"`entropy` must be given, or .*verl_sega.*trainer_mode=sega"):
        verl.sega_advantages(mask * 0.0, mask, UIDS)
    with pytest.raises(ValueError, match="`index` must be verl's uid"):
        verl.sega_advantages(mask * 0.0, mask, entropy=entropy)
    with pytest.raises(ValueError, match=r"`algorithm.sega` must be of fork_weight, .*, got lambda"):
        verl.sega_advantages(mask * 0.0, mask, UIDS, {"sega": {"lambda": 1}}, entropy=entropy)


@pytest.fixture
def trainer(fake_verl, stand_in, monkeypatch):
    class PPOTrainerSync:
        def __init__(self, config):
            self.config, self.mode = config, config.trainer.v1.trainer_mode

        def _compute_advantage(self, batch, metrics):
            _, mask, _ = batch.data
            self.found, _ = fake_verl.registry["sega"](mask * 0.0, mask, UIDS, self.config.algorithm)
            return "batch"

    def kv_batch_get(keys, partition_id, select_fields):
        assert keys == ["k"] and partition_id == "train"
        entropy, mask, start = batch()
        ids = torch.where(torch.arange(6) == start[:, None] - 1, 7, 1)
        ids[0] = torch.where(ids[0] == 7, 8, 1)  # written in another way
        fields = {"entropy": entropy, "responses": ids, "response_mask": mask}
        assert set(select_fields) == set(fields)
        return SimpleNamespace(to_padded_tensor=lambda: fields)

    base = SimpleNamespace(tq=SimpleNamespace(kv_batch_get=kv_batch_get))
    stand_in(
        "verl.trainer.ppo.v1", PPOTrainerSync=PPOTrainerSync, trainer_base=base,
        register_trainer=lambda name: lambda cls: fake_verl.registry.setdefault(("trainer", name), cls),
    )  # fmt: skip
    monkeypatch.delitem(sys.modules, "gem_kernels.integrations.verl_sega", raising=False)
    importlib.import_module("gem_kernels.integrations.verl_sega")
    monkeypatch.delitem(sys.modules, "gem_kernels.integrations.verl_sega")
    return fake_verl.registry["trainer", "sega"]


class Settings(dict):
    __getattr__ = dict.__getitem__


def verl_config(estimator="sega", **sega):
    v1 = SimpleNamespace(trainer_mode="sega")
    return SimpleNamespace(algorithm=Settings(adv_estimator=estimator, sega=sega), trainer=SimpleNamespace(v1=v1))


@pytest.mark.parametrize("marker", [None, "####", ["####", " ####"]])
def test_verl_s_trainer_shows_the_entropies_to_the_estimator(trainer, marker):
    made = trainer(verl_config(fork_weight=0.5, marker=marker))
    assert made.mode == "sync"
    made.tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [7] if text == "####" else [8])
    metrics: dict = {}
    given = SimpleNamespace(keys=["k"], partition_id="train", data=batch())
    assert made._compute_advantage(given, metrics) == "batch"
    entropy, mask, start = batch()
    start = torch.where((start < 1) | (mask.sum(1) == 0), -1, start) if marker else torch.full((5,), -1)
    if marker == "####":
        start[0] = -1
    want, _ = verl.sega_advantages(mask * 0.0, mask, UIDS, made.config.algorithm, entropy=entropy, answer_start=start)
    assert torch.equal(made.found, want) and metrics["gem/valid"] == pytest.approx(0.8)
    assert verl._stored.get() is None


def test_verl_s_trainer_refuses_what_has_no_entropies(trainer):
    with pytest.raises(ValueError, match=r"`algorithm.adv_estimator` must be 'sega'"):
        trainer(verl_config("grpo"))
    config = verl_config()
    config.algorithm["rollout_correction"] = {"bypass_mode": True}
    with pytest.raises(ValueError, match="bypass_mode"):
        trainer(config)

"""The adapters of trainers that are not installed here, each against a stand-in with the parameters it is written for.

A stand-in computes nothing but `own`. `python -m tests.integrations.others` runs the adapters against the trainers.
"""

from __future__ import annotations

import importlib
import runpy
import sys
import types
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gem_kernels import entropy_scores, group_advantages
from gem_kernels.integrations import openrlhf, prime_rl, slime, verl
from gem_kernels.integrations.swap import Ours
from tests.kernels.helpers import assert_near

V, D = 37, 16
ROOT = Path(__file__).parents[2]


def own(*args, **kwargs):
    return "own"


@pytest.fixture
def stand_in(monkeypatch):
    """stand_in("a.b", name=object) puts modules of these names, and those above them, in sys.modules."""

    def put(name, **objects):
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            full = ".".join(parts[:i])
            if full not in sys.modules:
                module = types.ModuleType(full)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, full, module)
        for key, value in objects.items():
            setattr(sys.modules[name], key, value)
        return sys.modules[name]

    return put


def exact(logits, targets):
    logp = logits.double().log_softmax(-1)
    return logp.gather(-1, targets[..., None])[..., 0].float(), -(logp.exp() * logp).sum(-1).float()


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 5, D, generator=generator), torch.randn(V, D, generator=generator)
    targets = torch.randint(0, V, (2, 5), generator=generator)
    return SimpleNamespace(hidden=hidden, weight=weight, targets=targets, logits=hidden @ weight.t())


# verl


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


@pytest.mark.parametrize("adapter, name", [(verl, "verl"), (openrlhf, "openrlhf"), (prime_rl, "prime_rl")])
def test_a_trainer_that_is_not_installed(adapter, name):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(ValueError, match=rf"`{name}` must be installed, in version 0\.\d+, got no module {name}$"):
        adapter.use_gem_kernels()


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


UIDS = ["b", "a", "b", "a", "b"]


def batch():
    entropy = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(6) < torch.tensor([6, 4, 5, 0, 3])[:, None]).long()
    return entropy, mask, torch.tensor([4, 2, -1, 0, 1])


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


# OpenRLHF


@pytest.fixture
def fake_openrlhf(stand_in):
    def log_probs_from_logits(logits, labels, temperature=1.0):
        return "own"

    def compute_entropy(logits):
        return "own"

    stand_in("openrlhf")
    helpers = {"log_probs_from_logits": log_probs_from_logits, "compute_entropy": compute_entropy}
    return stand_in(openrlhf.HELPERS, **helpers), stand_in("openrlhf.models.actor", **helpers)


def test_openrlhf_s_helpers(fake_openrlhf, tensors):
    helpers, actor = fake_openrlhf
    before = tensors.logits.clone()
    with openrlhf.use_gem_kernels():
        with openrlhf.use_gem_kernels():
            pass
        found = actor.log_probs_from_logits(tensors.logits, tensors.targets, temperature=0.7)
        assert_near(found, exact(tensors.logits / 0.7, tensors.targets)[0])
        assert torch.equal(before, tensors.logits)
        assert_near(actor.compute_entropy(tensors.logits), exact(tensors.logits, tensors.targets)[1])
        assert actor.compute_entropy(tensors.logits.double()) == "own"
        assert helpers.log_probs_from_logits(tensors.logits, tensors.targets, temperature=0.0) == "own"
    assert actor.compute_entropy(tensors.logits) == "own"


def test_another_openrlhf_is_refused(fake_openrlhf, monkeypatch):
    monkeypatch.setattr(fake_openrlhf[0], "compute_entropy", lambda logits, chunk_size: None)
    with pytest.raises(ValueError, match=r"`openrlhf` must be of version 0\.11, .*compute_entropy .*chunk_size\)"):
        openrlhf.use_gem_kernels()
    assert not isinstance(fake_openrlhf[1].log_probs_from_logits, Ours)


# prime-rl


@pytest.fixture
def fake_prime(stand_in):
    class Head(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, labels, inv_temperature, chunk_size, sampling_mask=None):
            return hidden.sum(-1)

    class Gemma(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, labels, inv_temperature, chunk_size, softcap):
            return hidden.sum(-1)

    class LossOutputs(SimpleNamespace):
        pass

    stand_in("prime_rl")
    stand_in(prime_rl.LOSSES, LossOutputs=LossOutputs)
    names = {"lm_head": {prime_rl.HEAD: Head}, "lm_head_gemma": {prime_rl.GEMMA: Gemma}}
    return [stand_in(f"{prime_rl.LAYERS}.{name}", **objects) for name, objects in names.items()]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_prime_rl_s_heads(fake_prime, tensors, softcap):
    """Temperatures of each token's own, and gradients through the entropy."""
    module, name = fake_prime[softcap is not None], prime_rl.HEAD if softcap is None else prime_rl.GEMMA
    hidden, labels = tensors.hidden.view(-1, D), tensors.targets.view(-1)
    temperature = torch.linspace(0.6, 1.4, 10)
    last = () if softcap is None else (softcap,)

    def gradients(function, leaves):
        leaves = [x.clone().requires_grad_() for x in leaves]
        logprobs, entropy = function(*leaves)
        loss = (logprobs * torch.arange(10)).sum() + entropy.sum()
        return (logprobs, entropy, *torch.autograd.grad(loss, leaves))

    def plain(h, w):
        z = h @ w.t()
        return exact((z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature[:, None], labels)

    with prime_rl.use_gem_kernels():
        with prime_rl.use_gem_kernels():
            pass
        apply = getattr(module, name).apply
        found = gradients(lambda h, w: apply(h, w, labels, 1 / temperature, 4, *last), [hidden, tensors.weight])
        if softcap is None:
            assert apply(hidden, tensors.weight, labels, 1 / temperature, 4, labels[:, None]).shape == (10,)
        assert apply(hidden.double(), tensors.weight, labels, 1 / temperature, 4, *last).dtype == torch.float64
    for x, y in zip(found, gradients(plain, [hidden, tensors.weight])):
        assert_near(x, y, 2.0**-14)
    assert not isinstance(getattr(module, name), Ours)


def test_another_prime_rl_is_refused(fake_prime, monkeypatch):
    monkeypatch.delattr(fake_prime[1], prime_rl.GEMMA)
    with pytest.raises(ValueError, match=r"`prime_rl` must be of version 0\.8, .*lm_head_gemma\._Gemma.*without it"):
        prime_rl.use_gem_kernels()
    assert not isinstance(getattr(fake_prime[0], prime_rl.HEAD), Ours)


def test_prime_rl_s_custom_loss(fake_prime):
    """Worked by hand: ratios 1, 2, 4; the last token does not count."""
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    ratio = torch.tensor([1.0, 2.0, 4.0, 8.0])
    inputs = SimpleNamespace(
        trainer_logprobs=logprobs, inference_logprobs=logprobs.detach() - ratio.log(), ref_logprobs=None,
        advantages=torch.tensor([0.5, -1.0, 2.0, float("nan")]), loss_mask=torch.tensor([True, True, True, False]),
        loss_weights=None,
    )  # fmt: skip
    out = prime_rl.sega_loss(inputs)
    assert out.loss.item() == pytest.approx(0.5 * 1 - 1.0 * 2 + 2.0 * 3)
    assert out.metrics["gem/importance"].item() == pytest.approx(7 / 3)
    assert out.metrics["gem/logprob"].item() == pytest.approx(-2.0)
    capped = prime_rl.sega_loss(inputs, importance_cap=3.0)
    assert capped.loss.item() == pytest.approx(0.5 * 1 - 2.0 * 2 + 6.0 * 3, rel=1e-5)
    inputs.loss_weights = torch.tensor([0.0, 0.0, 1.0, 1.0])
    (gradient,) = torch.autograd.grad(prime_rl.sega_loss(inputs, importance_cap=3.0).loss, logprobs)
    assert gradient.tolist() == pytest.approx([0.0, 0.0, -6.0, 0.0])
    with pytest.raises(ValueError, match="`importance_cap` must be"):
        prime_rl.sega_loss(inputs, importance_cap=0.0)


# axolotl


class Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, last_hidden, weight, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1
    ):
        return last_hidden.sum(-1)


class NewerFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0,
        outputs=("entropy",),
    ):  # fmt: skip
        return hidden.sum(-1)


@pytest.fixture
def fake_trl(monkeypatch, stand_in):
    """TRL 1.9, and `axolotl`; where trl is installed, in its place."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    stand_in("axolotl.integrations.base", BasePlugin=type("BasePlugin", (), {}))
    stand_in("trl", __version__="1.9.0").trainer = stand_in("trl.trainer")
    utils = stand_in(
        "trl.trainer.utils", _ChunkedLogProbFunction=Function, selective_log_softmax=lambda logits, index: "own",
        entropy_from_logits=lambda logits, chunk_size=128: "own",
    )  # fmt: skip
    sys.modules["trl.trainer"].utils = utils
    return utils


@pytest.fixture
def plugin(fake_trl, monkeypatch):
    """Of modules of its own, which have the stand-ins for good."""
    import gem_kernels.integrations as package

    for name in ("trl", "axolotl"):
        monkeypatch.delitem(sys.modules, f"gem_kernels.integrations.{name}", raising=False)
        monkeypatch.delattr(package, name, raising=False)
    yield importlib.import_module("gem_kernels.integrations.axolotl").GemKernelsPlugin()
    for name in ("trl", "axolotl"):
        del sys.modules[f"gem_kernels.integrations.{name}"]
        delattr(package, name)


def test_axolotl_s_plugin_with_the_trl_of_the_other_adapter(plugin, fake_trl):
    def pair(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None):
        return "own"

    fake_trl._ChunkedLogProbFunction, fake_trl.selective_log_softmax_and_entropy = NewerFunction, pair
    fake_trl.selective_log_softmax = lambda logits, index, temperature=1.0, row_mask=None: "own"
    for _ in range(2):
        plugin.pre_model_load({})
        assert isinstance(fake_trl._ChunkedLogProbFunction, Ours)
        assert isinstance(fake_trl.selective_log_softmax_and_entropy, Ours)
    plugin.post_train_unload({})
    plugin.post_train_unload({})
    assert fake_trl._ChunkedLogProbFunction is NewerFunction


def test_axolotl_s_plugin_with_trl_1_9(plugin, fake_trl, tensors):
    hidden, targets = tensors.hidden.view(-1, D), tensors.targets.view(-1)
    plugin.pre_model_load({})
    found = fake_trl._ChunkedLogProbFunction.apply(hidden, tensors.weight, targets, 0.7, 8, 5.0, 1.3)
    logits = 5.0 * torch.tanh(1.3 * tensors.logits.view(-1, V) / 5.0) / 0.7
    for x, y in zip(found, exact(logits, targets)):
        assert_near(x, y)
    assert_near(fake_trl.selective_log_softmax(logits, targets), exact(logits, targets)[0])
    assert_near(fake_trl.entropy_from_logits(logits, chunk_size=2), exact(logits, targets)[1])
    wide = fake_trl._ChunkedLogProbFunction.apply(hidden.double(), tensors.weight, targets, 0.7, 8)
    assert wide.dtype == torch.float64
    plugin.post_train_unload({})
    assert fake_trl.selective_log_softmax(logits, targets) == "own"


def test_axolotl_s_plugin_refuses_another_trl(plugin, fake_trl, monkeypatch):
    monkeypatch.setattr(fake_trl, "entropy_from_logits", lambda logits: None)
    with pytest.raises(ValueError, match=r"`trl` must be of version 1\.9 or 1\.16, whose .*entropy_from_logits"):
        plugin.pre_model_load({})


# slime


def slime_data():
    entropy, mask, start = batch()
    lengths = [6, 4, 5, 6, 3]  # one sample has no counted token
    ids = torch.where(torch.arange(6) == start[:, None] - 1, 7, 1)
    ids[3] = 1
    return {
        "entropy": [x[:n] for x, n in zip(entropy, lengths)], "response_lengths": lengths,
        "loss_masks": [x[:n] for x, n in zip(mask, lengths)],
        "tokens": [torch.cat([torch.full((4,), 7), x[:n]]) for x, n in zip(ids, lengths)],
        "sample_indices": [3, 0, 4, 1, 5],
    }  # fmt: skip


@pytest.mark.parametrize("marker", [None, [7], [[7], [9]]])
def test_slime_s_advantages_are_those_of_this_package(marker):
    data, (entropy, mask, start) = slime_data(), batch()
    args = SimpleNamespace(n_samples_per_prompt=3, gem_sega={"fork_weight": 0.5, "scale": "group", "marker": marker})
    assert slime.sega_advantages(args, data) is None
    start = torch.where(start < 1, -1, start) if marker else torch.full((5,), -1)
    scores = entropy_scores(entropy, completion_mask=mask, answer_start=start, fork_weight=0.5)
    ids = torch.tensor([1, 0, 1, 0, 1])
    want = group_advantages(scores.score, valid=scores.valid, group_ids=ids, scale="group")
    assert want[0] != 0 and want[3] == 0
    for field in ("advantages", "returns"):
        for found, a, row in zip(data[field], want, data["entropy"], strict=True):
            assert found.shape == row.shape and torch.equal(found, a.expand(found.shape))


def test_slime_puts_groups_together_that_lie_on_several_ranks(monkeypatch, stand_in):
    """The second of three ranks; the others' samples come by all_gather_object."""
    data, args = slime_data(), SimpleNamespace(n_samples_per_prompt=3)
    first, third = ([1, 1], [0.25, 9.0], [True, False]), ([0], [-0.5], [True])

    def all_gather_object(every, mine, group):
        assert group == "group"
        every[:] = [first, mine, third]

    stand_in("megatron.core.mpu", get_data_parallel_group=lambda: "group")
    for name, function in {
        "is_initialized": lambda: True, "get_rank": lambda group: 1, "get_world_size": lambda group: 3,
        "all_gather_object": all_gather_object,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.distributed, name, function)
    slime.sega_advantages(args, data)
    entropy, mask, _ = batch()
    scores = entropy_scores(entropy, completion_mask=mask, answer_start=torch.full((5,), -1))
    every = torch.cat([torch.tensor([0.25, 9.0]), scores.score, torch.tensor([-0.5])])
    valid = torch.cat([torch.tensor([True, False]), scores.valid, torch.tensor([True])])
    want = group_advantages(every, valid=valid, group_ids=torch.tensor([1, 1, 1, 0, 1, 0, 1, 0]))[2:7]
    assert [float(x[0]) for x in data["advantages"]] == pytest.approx(want.tolist())


def test_slime_says_what_is_missing():
    data, args = slime_data(), SimpleNamespace(n_samples_per_prompt=3)
    with pytest.raises(ValueError, match="--use-rollout-entropy"):
        slime.sega_advantages(args, data | {"entropy": None})
    with pytest.raises(ValueError, match=r"`gem_sega` must be of fork_weight, .*, got lambda"):
        slime.sega_advantages(SimpleNamespace(n_samples_per_prompt=3, gem_sega={"lambda": 1}), data)
    with pytest.raises(ValueError, match="`context_parallel_size` must be 1"):
        slime.sega_advantages(SimpleNamespace(n_samples_per_prompt=3, context_parallel_size=2), data)

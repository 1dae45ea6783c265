"""The adapters of trainers that are not installed here, each against a stand-in with the parameters it is written for.

A stand-in computes nothing but `own`. `python -m tests.integrations.others` runs the adapters against the trainers.
"""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from gem_kernels import entropy_scores, group_advantages
from gem_kernels.integrations import openrlhf, prime_rl, slime, verl
from gem_kernels.integrations.settings import Sega
from gem_kernels.integrations.swap import Ours
from tests.integrations.tiny import D, V, batch, exact
from tests.kernels.helpers import assert_near

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("adapter, name", [(verl, "verl"), (openrlhf, "openrlhf"), (prime_rl, "prime_rl")])
def test_a_trainer_that_is_not_installed(adapter, name):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(ValueError, match=rf"`{name}` must be installed, in version 0\.\d+, got no module {name}$"):
        adapter.use_gem_kernels()


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


# What docs/integrations.md and the example show.

PAGE = (ROOT / "docs" / "integrations.md").read_text()
SHOWN = dict(re.findall(r"```\w+ (\w+)\n(.*?)```", PAGE, flags=re.DOTALL))
RUN = (ROOT / "examples" / "verl_plugin" / "run.sh").read_text()


@pytest.mark.parametrize("name, adapter", [("openrlhf", openrlhf), ("prime_rl", prime_rl)])
def test_the_page_s_python_is_run(name, adapter, fake_openrlhf, fake_prime, monkeypatch):
    started = []
    monkeypatch.setattr(runpy, "run_module", lambda module, run_name: started.append((module, run_name)))
    swaps = []
    monkeypatch.setattr(adapter, "use_gem_kernels", lambda own=adapter.use_gem_kernels: swaps.append(own()))
    try:
        exec(SHOWN[name], {})
        assert len(swaps) == 1 and swaps[0].pairs
    finally:
        swaps[0].undo()
    assert [(module.partition(".")[0], run_name) for module, run_name in started] == [(name, "__main__")]


def test_every_dotted_name_that_is_shown_is_there():
    shown = [*SHOWN.values(), RUN, (ROOT / "examples" / "verl_plugin" / "README.md").read_text(), PAGE]
    names = {name for text in shown for name in re.findall(r"gem_kernels\.integrations\.\w+(?:\.\w+)?", text)}
    assert len(names) >= 7
    for name in names:
        _, _, module, *inner = name.split(".")
        source = (ROOT / "gem_kernels" / "integrations" / f"{module}.py").read_text()
        for found in inner:
            assert re.search(rf"^(def|class) {found}\b", source, flags=re.MULTILINE), name


def test_every_setting_that_is_shown_is_there():
    fields = set(Sega.__dataclass_fields__)
    for text in (SHOWN["verl"], RUN):
        keys = re.findall(r"\+algorithm\.sega\.(\w+)=", text)
        assert keys and set(keys) <= fields
        assert "trainer.v1.trainer_mode=sega" in text and "algorithm.adv_estimator=sega" in text
        assert "VERL_USE_EXTERNAL_PLUGINS=gem_kernels" in text
    config = yaml.safe_load(SHOWN["slime_config"])["gem_sega"]
    assert slime.settings_of(config, "gem_sega").marker == [[820], [4242]]
    tomllib = pytest.importorskip("tomllib")
    loss = tomllib.loads(SHOWN["prime_rl_loss"])["trainer"]["loss"]
    assert set(loss["kwargs"]) <= set(inspect.signature(prime_rl.sega_loss).parameters)
    assert yaml.safe_load(SHOWN["axolotl"])["plugins"] == ["gem_kernels.integrations.axolotl.GemKernelsPlugin"]

"""verl: the plugin by its entry point, a tiny model through verl's fused forward, the helpers, the estimator."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import transformers
from verl.models.transformers.monkey_patch import patch_forward_with_backends
from verl.trainer.ppo import core_algos
from verl.utils import torch_functional as helpers
from verl.utils.experimental import torch_functional as heads

from gem_kernels import entropy_scores, group_advantages
from gem_kernels.integrations import verl as integration
from gem_kernels.integrations.swap import Ours
from tests.integrations.others.checks import V, compare, exact, inputs, run, versions


def the_plugin() -> None:
    """Loaded by `import verl` because VERL_USE_EXTERNAL_PLUGINS names it; and only then."""
    assert isinstance(heads.FusedLinearForPPO.forward, Ours) and isinstance(helpers.logprobs_from_logits, Ours)
    assert core_algos.get_adv_estimator_fn("sega") is integration.sega_advantages
    code = (
        "import verl; from verl.trainer.ppo import core_algos; from verl.utils import torch_functional as helpers;"
        "print('sega' in core_algos.ADV_ESTIMATOR_REGISTRY, helpers.logprobs_from_logits.__class__.__name__)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VERL_USE")}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split()[-2:] == ["False", "function"], out.stdout
    code = "import verl; from verl.trainer.ppo.v1 import get_trainer_cls; print(get_trainer_cls('sega').__name__)"
    environment["VERL_USE_EXTERNAL_MODULES"] = "gem_kernels.integrations.verl_sega"
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split()[-1] == "SegaTrainer", out.stdout
    print("  plugin: loaded and registered where it is named, and only there; the trainer too")


def a_model() -> None:
    """A Llama of two layers under verl's fused forward, stock and swapped."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    ids = torch.randint(0, V, (2, 9))
    parameters = dict(model.named_parameters())

    def through(model):
        def call(*values):
            tensors = dict(zip(parameters, values))
            given = {"input_ids": ids, "temperature": 0.8, "return_dict": True}
            output = torch.func.functional_call(model, tensors, kwargs=given)
            return output.log_probs, output.entropy

        return call

    ours = run(through(model), list(parameters.values()))
    with mock.patch.object(heads.FusedLinearForPPO, "forward", STOCK):
        own = run(through(model), list(parameters.values()))
    truth = run(through(model.double()), [x.double() for x in parameters.values()])
    compare("a tiny model, fused forward, float32", ours, own, truth)


def the_head_and_helpers() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        one_dtype(dtype)


def one_dtype(dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs(dtype, 2, 37)
    module = heads.FusedLinearForPPO()
    ours, own = (run(lambda h, w, f=f: f(module, h, w, targets, 0.7), [hidden, weight]) for f in (SWAPPED, STOCK))
    truth = run(lambda h, w: exact(h @ w.t() / 0.7, targets), [hidden.double(), weight.double()])
    compare(f"FusedLinearForPPO, {dtype}", ours, own, truth)

    logits = (hidden.float() @ weight.float().t()).to(dtype).view(-1, V)
    targets = targets.view(-1)
    logprobs = helpers.logprobs_from_logits
    truth = run(lambda z: exact(z, targets), [logits.double()])
    for name in ("entropy_from_logits", "entropy_from_logits_with_chunking"):
        entropy = getattr(helpers, name)
        ours = run(lambda z, f=entropy: (logprobs(z, targets), f(z)), [logits])
        own = run(lambda z, f=entropy: (logprobs.own(z, targets), f.own(z)), [logits])
        compare(f"logprobs_from_logits, {name}, {dtype}", ours, own, truth)
        compiled = torch.compile(entropy, dynamic=True, backend="eager")  # verl's engines compile it
        assert torch.equal(compiled(logits), entropy(logits))
    apart, inplace = (
        run(lambda z, i=i: (logprobs(z * 1, targets, inplace_backward=i), z.float().sum(-1) * 0), [logits])[-1]
        for i in (False, True)
    )
    assert torch.equal(apart, inplace)


class Queue:
    """A stand-in for TransferQueue's client: one batch in memory."""

    def __init__(self, fields):
        self.fields = fields

    def kv_batch_get(self, keys, partition_id, select_fields):
        from tensordict import TensorDict

        found = {name: self.fields[name] for name in select_fields if name in self.fields}
        return TensorDict(found, batch_size=[len(keys)])

    def kv_batch_put(self, keys, partition_id, fields):
        self.fields |= dict(fields.items())
        return partition_id


def the_trainer() -> None:
    """`_compute_advantage` of the registered trainer, on a batch as verl's replay buffer hands it."""
    from omegaconf import OmegaConf
    from tensordict.tensorclass import NonTensorStack
    from transfer_queue import KVBatchMeta
    from verl.trainer.ppo.v1 import get_trainer_cls

    import gem_kernels.integrations.verl_sega as sega

    cls = get_trainer_cls("sega")
    assert cls is sega.SegaTrainer
    algorithm = OmegaConf.create({
        "adv_estimator": "sega", "gamma": 1.0, "lam": 1.0, "use_kl_in_reward": False, "rollout_correction": None,
        "sega": {"marker": "####", "fork_weight": 0.5, "top_m": 2},
    })  # fmt: skip
    config = OmegaConf.create({"algorithm": algorithm, "actor_rollout_ref": {"rollout": {"n": 2}}})
    generator = torch.Generator().manual_seed(0)
    lengths, marked, uids = [7, 5, 6, 4], [3, 2, 99, 1], ["b", "a", "b", "a"]
    entropy = [torch.rand(n, generator=generator) for n in lengths]
    responses = [torch.full((n,), 9) for n in lengths]
    for ids, at in zip(responses, marked):
        ids[at : at + 1] = 5  # the marker's token

    def nested(values):
        return torch.nested.as_nested_tensor(values, layout=torch.jagged)

    queue = Queue({
        "uid": NonTensorStack(*uids), "entropy": nested(entropy), "responses": nested(responses),
        "response_mask": nested([torch.ones(n, dtype=torch.int64) for n in lengths]),
        "rm_scores": nested([torch.rand(n, generator=generator) for n in lengths]),
        "old_log_probs": nested([torch.rand(n, generator=generator) for n in lengths]),
    })  # fmt: skip
    trainer = object.__new__(cls)  # its __init__ starts a cluster
    trainer.config, trainer.sega = config, integration.sega_settings(algorithm)
    trainer.tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [5])
    metrics: dict = {}
    with mock.patch.object(sega.trainer_base, "tq", queue):
        keys = [f"{uid}_0_{i}" for i, uid in enumerate(uids)]
        trainer._compute_advantage(KVBatchMeta(partition_id="train", keys=keys, tags=[{}] * 4), metrics)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    padded = torch.zeros(4, 7)
    padded[mask] = torch.cat(entropy)
    start = torch.tensor([at + 1 if at < n else -1 for at, n in zip(marked, lengths)])
    scores = entropy_scores(padded, completion_mask=mask, answer_start=start, fork_weight=0.5, top_m=2)
    want = group_advantages(scores.score, valid=scores.valid, group_ids=torch.tensor([0, 1, 0, 1]))
    for field in ("advantages", "returns"):
        found = queue.fields[field]
        for i, row in enumerate(found.unbind()):
            assert row.shape == (lengths[i],) and torch.equal(row, want[i].expand(lengths[i])), (field, i)
    assert abs(metrics["gem/score"] - float(scores.score.mean())) < 1e-6 and metrics["gem/valid"] == 1.0
    print("  trainer and estimator: the advantages are those of group_advantages(entropy_scores(...))")


def through_compute_advantage() -> None:
    """verl's own `compute_advantage` finds the estimator by its name."""
    from verl.protocol import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    data = DataProto.from_dict(
        {"token_level_rewards": torch.zeros(2, 4), "response_mask": mask},
        {"uid": np.array(["x", "x"], dtype=object)},
    )
    shown = integration.Stored(torch.rand(2, 4))
    with integration.stored(shown):
        found = compute_advantage(data, adv_estimator="sega", config={}).batch["advantages"]
    assert found.shape == (2, 4) and abs(float(found[0, 0] + found[1, 0])) < 1e-6 and float(found[0, 3]) == 0
    try:
        compute_advantage(data, adv_estimator="sega", config={})
    except ValueError as error:
        assert "verl_sega" in str(error)
    else:
        raise AssertionError("no entropies, no error")
    print("  compute_advantage: by name")


if __name__ == "__main__":
    versions("verl", "transformers", "ray", "tensordict")
    SWAPPED = heads.FusedLinearForPPO.forward
    STOCK = SWAPPED.own
    for check in (the_plugin, a_model, the_head_and_helpers, through_compute_advantage, the_trainer):
        check()
    print("verl: all as expected")

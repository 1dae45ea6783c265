"""TRL's trainers with its own head and helpers, and with this package's: same model, seed and data, the same losses."""

from __future__ import annotations

import contextlib
import runpy
import warnings
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from trl.trainer import utils  # noqa: E402

from gem_kernels.integrations import trl as integration  # noqa: E402
from gem_kernels.integrations.trl import use_gem_kernels  # noqa: E402
from tests.integrations.tiny import tiny_tokenizer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

V = 47
SHAPE = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
NAMES = tuple(integration.PARAMETERS)
STEPS = 5


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def counted(monkeypatch):
    """How many calls of the head this package computes."""
    calls = []

    def head(*args, _own=integration.head, **kwargs):
        result = _own(*args, **kwargs)
        calls.append(result is not None)
        return result

    monkeypatch.setattr(integration, "head", head)
    return calls


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(V)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """TRL loads reference models by name."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
    config = transformers.MixtralConfig(**SHAPE, **experts, output_router_logits=True)
    transformers.MixtralForCausalLM(config).save_pretrained(folder / "moe")
    return folder


def words(*numbers):
    return " ".join(f"w{i}" for i in numbers)


def reward(completions, **_):
    return [sum(int(word[1:]) for word in text.split() if word[0] == "w") / 100 for text in completions]


PROMPTS = [words(1, 2, 3), words(4, 5), words(6, 7, 8, 9), words(10, 11)]
GOOD, BAD = [words(12, 13, 14), words(15), words(16, 17), words(18, 19, 20)], [words(21), words(22, 23), *PROMPTS[:2]]
PAIRS = {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}
UNPAIRED = {"prompt": PROMPTS * 2, "completion": GOOD + BAD, "label": [True] * 4 + [False] * 4}
SAMPLED = {"num_generations": 2, "max_completion_length": 5, "temperature": 0.8, "beta": 0.05}
# trainer -> data, settings of its own
KINDS = {
    "SFT": ({"prompt": PROMPTS, "completion": GOOD}, {}),
    "DPO": (PAIRS, {"use_weighting": True}),  # which asks for log_sum_sq_probs
    "KTO": (UNPAIRED, {}),
    "GRPO": ({"prompt": PROMPTS}, SAMPLED),
    "RLOO": ({"prompt": PROMPTS}, SAMPLED),
}
# What trainers log of the optional outputs.
LOGGED = ("mean_token_accuracy", "logits/chosen", "logits/rejected")


def train(kind, name, models, tokenizer, folder, lora=False, **more):
    """-> the trainer, after STEPS."""
    data, settings = KINDS[kind]
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": STEPS, "logging_steps": 1,
        "disable_tqdm": True, "gradient_checkpointing": False, "learning_rate": 0.1, "optim": "sgd",
        "max_grad_norm": 0.0, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "seed": 3,
        **settings, **more,
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(models / name)
    given = {"processing_class": tokenizer, "train_dataset": datasets.Dataset.from_dict(data)}
    if kind in ("GRPO", "RLOO"):
        given["reward_funcs"] = reward
    if lora:
        given["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="trl|transformers|torch")
        trainer = getattr(trl, f"{kind}Trainer")(model, args=getattr(trl, f"{kind}Config")(**settings), **given)
        trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_both(kind, name, models, *args, **more):
    """Once with TRL's own, once with this package's: the same losses, the same way of all weights together."""
    own = train(kind, name, models, *args, **more)
    with use_gem_kernels():
        ours = train(kind, name, models, *args, **more)
    assert len(losses(own)) == own.state.max_steps and any(losses(own))
    for a, b in zip(losses(own), losses(ours)):
        assert abs(a - b) <= 1e-5 * max(1.0, abs(a))
    for a, b in zip(own.state.log_history, ours.state.log_history):
        for key in (key for key in LOGGED if key in a):
            assert abs(a[key] - b[key]) <= 1e-5 * max(1.0, abs(a[key])), key
    names = [key for key, a in own.model.named_parameters() if a.requires_grad]
    before = weights(transformers.AutoModelForCausalLM.from_pretrained(models / name), names)
    if "lora" in more:
        before = {key: torch.zeros(()) for key in names}
    a, b = weights(own.model, names), weights(ours.model, names)
    way, apart = ({key: x[key] - y[key] for key in names} for x, y in ((a, before), (a, b)))
    assert norm(way) > 0 and norm(apart) <= 1e-3 * norm(way)


def weights(model, names):
    found = dict(model.named_parameters())
    return {name: found[name].detach() for name in names if name in found}


def norm(parts):
    return float(sum(x.double().square().sum() for x in parts.values()) ** 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_losses(kind, models, tokenizer, tmp_path, counted):
    train_both(kind, "dense", models, tokenizer, tmp_path)
    assert counted and all(counted)


ALL = {"lora": True, "gradient_checkpointing": True}


@pytest.mark.parametrize(
    "kind,name,more",
    [
        ("GRPO", "dense", {"lora": True}),
        ("GRPO", "dense", {"gradient_checkpointing": True}),
        ("GRPO", "dense", {"entropy_coef": 0.1}),
        *((kind, "moe", {}) for kind in KINDS),
        *((kind, "moe", ALL) for kind in KINDS),
    ],
    ids=[
        "peft",
        "checkpointing",
        "entropy",
        *(f"{kind}-moe{x}" for x in ("", "-peft-checkpointing") for kind in KINDS),
    ],
)
def test_the_same_losses_with(kind, name, more, models, tokenizer, tmp_path, counted):
    """MoE: with the auxiliary loss of its router."""
    train_both(kind, name, models, tokenizer, tmp_path, **more, max_steps=2)
    assert counted and all(counted)


@pytest.mark.parametrize(
    "kind,settings",
    [*((kind, {}) for kind in KINDS), ("GRPO", {"cast_lm_head_to_fp32": True})],
    ids=[*KINDS, "fp32-head"],
)
def test_bf16_autocast_within_trl_s_own_error(kind, settings, models, tokenizer, tmp_path, counted):
    """The first step, where all have the same weights: the gradient's error against float32 is no larger than TRL's."""
    found = {}
    for who, more in (("exact", {}), ("own", {"bf16": True}), ("ours", {"bf16": True})):
        more = more | settings
        with use_gem_kernels() if who == "ours" else contextlib.nullcontext():
            # A step of SGD leaves the gradient in the weights.
            trainer = train(kind, "dense", models, tokenizer, tmp_path, **more, max_steps=1, learning_rate=1.0)
        found[who] = losses(trainer)[0], dict(trainer.model.named_parameters())
    assert counted and all(counted)
    loss, weights = found["exact"]
    error = {who: abs(found[who][0] - loss) for who in ("own", "ours")}
    assert error["ours"] <= 2 * error["own"] + 2.0**-8 * max(abs(loss), 0.1)
    start = dict(transformers.AutoModelForCausalLM.from_pretrained(models / "dense").named_parameters())
    for name, exact in weights.items():
        size = (exact - start[name]).norm()
        error = {who: (found[who][1][name] - exact).norm() for who in ("own", "ours")}
        assert error["ours"] <= 2 * error["own"] + 2.0**-10 * size, name


# The head alone.

# hidden, weight, autocast
DTYPES = {
    "float32": (torch.float32, torch.float32, None),
    "bfloat16": (torch.bfloat16, torch.bfloat16, None),
    "autocast": (torch.float32, torch.float32, torch.bfloat16),
    "autocast, bfloat16 hidden": (torch.bfloat16, torch.float32, torch.bfloat16),
    "float32 head of bfloat16": (torch.float32, torch.bfloat16, None),
}


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "softcap"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_the_head(dtypes, softcap, device):
    """Values and gradients against float64; at most twice TRL's own error."""
    generator = torch.Generator().manual_seed(0)
    hidden_dtype, dtype, autocast = DTYPES[dtypes]
    leaves = [torch.randn(*shape, generator=generator) for shape in ((9, 16), (V, 16), (V,))]
    leaves = [x.to(device, d) for x, d in zip(leaves, (hidden_dtype, dtype, dtype))]
    targets = torch.randint(0, V, (9,), generator=generator).to(device)
    targets[::2] = (leaves[0].double() @ leaves[1].double().T + leaves[2].double()).argmax(-1)[::2]
    a, b = torch.randn(2, 9, generator=generator).to(device)
    outputs = integration.OUTPUTS

    def run(leaves, apply):
        leaves = [x.clone().requires_grad_() for x in leaves]
        with torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext():
            found = apply(*leaves, targets, 0.7, 32768, softcap, 1.3, outputs)
        assert not any(x.requires_grad for x in found[2:])
        grads = torch.autograd.grad((found[0] * a).sum() + (found[1] * b).sum(), leaves)
        return [*found, *grads]

    def exact(hidden, weight, bias, *_):
        z = (hidden @ weight.T + bias) * 1.3
        z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / 0.7
        p = z.log_softmax(-1)
        found = p.gather(-1, targets[:, None])[:, 0], -(p.exp() * p).sum(-1)
        first = z.detach().argmax(-1) == targets
        return *found, (2 * p.detach()).logsumexp(-1), z.detach().mean(-1), first

    own = utils._ChunkedLogProbFunction.apply
    with use_gem_kernels():
        ours = run(leaves, utils._ChunkedLogProbFunction.apply)
    with torch.autocast(device.type, enabled=False):
        autocast, low = None, autocast
        want = run([x.double() for x in leaves], exact)
        autocast = low
    theirs = run(leaves, own)
    assert len(ours) == len(theirs) == len(want) == 8
    for name, x, y, z in zip((*outputs, *"hwb"), ours, theirs, want):
        assert x.dtype == y.dtype and x.shape == y.shape, name
        if name == "is_top1":
            assert torch.equal(x, y) and x.any() and not x.all()
            continue
        error, limit = ((v.double() - z).norm() for v in (x, y))
        assert error <= 2 * limit + 2.0**-18 * z.norm(), (name, error, limit)
        if x.dtype == torch.float32:  # gradients of float32 tensors are not rounded to bfloat16 on the way
            assert (x.bfloat16() != x).sum() > x.numel() / 2, name


def refused(**more):
    given = {
        "hidden": torch.randn(5, 16), "weight": torch.randn(V, 16), "bias": None, "targets": torch.arange(5),
        "temperature": 1.0, "chunk_size": 32768, "outputs": ("log_probs",), **more,
    }  # fmt: skip
    return integration.head(**given) is None


def test_what_goes_to_trl_s_own():
    weight = torch.randn(V, 16)
    weight.ds_status = "partitioned"
    assert not refused() and not refused(outputs=integration.OUTPUTS, final_logit_softcapping=5.0)
    assert refused(weight=weight) and refused(hidden=torch.randn(5, 16).double())
    assert refused(hidden=torch.randn(5, 16, device="meta")) and refused(logit_scale=0.0)
    with use_gem_kernels():
        found = utils._ChunkedLogProbFunction.apply(
            torch.randn(5, 16, dtype=torch.float64), torch.randn(V, 16).double(), None, torch.arange(5), 1.0, 32768
        )
    assert all(x is not None for x in found)
    asked = integration.head(
        torch.randn(5, 16), torch.randn(V, 16), None, torch.arange(5), 1.0, 9, outputs=("is_top1",)
    )
    assert [x is not None for x in asked] == [True, False, False, False, True]


# The helpers.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_helpers(dtype, device):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, V, generator=generator).mul(3).to(device, dtype)
    index = torch.randint(0, V, (2, 5), generator=generator).to(device)
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 1, 1, 1]], device=device)

    def run(logits):
        leaf = logits.clone().requires_grad_()
        one = utils.selective_log_softmax(leaf, index, temperature=0.8, row_mask=mask)
        entropy = utils.entropy_from_logits(leaf, chunk_size=3)
        pair = utils.selective_log_softmax_and_entropy(leaf, index, temperature=0.8, row_mask=mask)
        total = one.float().sum() - 0.1 * entropy.float().sum() + sum(x.float().sum() for x in pair)
        return one, entropy, *pair, *torch.autograd.grad(total, leaf)

    want, theirs = run(logits.double()), run(logits)
    with use_gem_kernels():
        ours = run(logits)
        several = utils.selective_log_softmax(logits, index[..., None].expand(2, 5, 3))
        detached = utils.selective_log_softmax_and_entropy(logits.requires_grad_(), index, entropy_requires_grad=False)
    for x, y, z in zip(ours, theirs, want):
        assert (x.double() - z).norm() <= 2 * (y.double() - z).norm() + 2.0**-18 * z.norm()
    assert several.shape == (2, 5, 3) and detached[0].requires_grad and not detached[1].requires_grad
    assert (ours[0][mask == 0] == 0).all() and (ours[3][mask == 0] == 0).all()


# The swap.


def now():
    return [getattr(utils, name) for name in NAMES]


def test_the_block_puts_back_what_was_there():
    import trl.trainer.grpo_trainer as importer

    before = now()
    importer.selective_log_softmax = utils.selective_log_softmax  # as `from ..utils import` does
    try:
        with use_gem_kernels():
            assert all(isinstance(found, integration.Ours) for found in now())
            assert importer.selective_log_softmax is utils.selective_log_softmax
            with use_gem_kernels():
                pass
            assert all(isinstance(found, integration.Ours) for found in now())
            importer.entropy_from_logits = utils.entropy_from_logits  # imported while it was swapped
        assert now() == before
        assert importer.selective_log_softmax is before[1] and importer.entropy_from_logits is before[2]
    finally:
        del importer.selective_log_softmax, importer.entropy_from_logits


def test_the_function_stays_until_undone():
    before = now()
    swap = use_gem_kernels()
    try:
        assert all(isinstance(found, integration.Ours) for found in now())
    finally:
        swap.undo()
    assert now() == before
    swap.undo()
    assert now() == before


def test_another_trl_is_refused(monkeypatch):
    before = now()
    monkeypatch.setattr(utils, "selective_log_softmax", lambda logits, index, dim: None)
    with pytest.raises(ValueError, match=r"`trl` must be of version 1\.16, whose .*selective_log_softmax .*dim\)"):
        use_gem_kernels()
    monkeypatch.delattr(utils, "selective_log_softmax")
    with pytest.raises(ValueError, match="without it"):
        use_gem_kernels()
    monkeypatch.undo()
    assert now() == before


def test_the_example_runs(models, tmp_path, capsys):
    path = Path(__file__).parents[2] / "examples" / "trl_grpo.py"
    main = runpy.run_path(str(path))["main"]
    settings = {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 3, "max_steps": 2}
    own = utils._ChunkedLogProbFunction
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="trl|transformers|torch")
        trainer = main(str(models / "dense"), str(tmp_path), **settings, use_cpu=True, bf16=False, disable_tqdm=True)
    assert len(losses(trainer)) == 2 and utils._ChunkedLogProbFunction is own


def test_the_comparison_runs():
    from bench.trl_methods import compare

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="trl|transformers|torch")
        own, ours, peaks = compare("KTO", 1, (V, 16, 2, 8))
    assert len(own) == len(ours) == 1 and min(own + ours) > 0 and peaks.keys() == {"own", "ours"}

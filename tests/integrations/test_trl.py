"""TRL's trainers with its own head and helpers, and with this package's: same model, seed and data, the same losses."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from trl.trainer import utils  # noqa: E402

from gem_kernels.integrations import trl as integration  # noqa: E402
from gem_kernels.integrations.trl import use_gem_kernels  # noqa: E402
from tests.kernels.helpers import assert_near  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

V = 47
SHAPE = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
NAMES = tuple(integration.PARAMETERS)
STEPS = 3


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
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(V - 3))])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """TRL loads reference models by name."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(folder / "dense")
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
# trainer, data, settings of its own, which of its first calls of the head are computed here
KINDS = {
    "SFT": ({"prompt": PROMPTS, "completion": GOOD}, {}, False),
    "DPO": (PAIRS, {}, True),  # the reference model's
    "KTO": (UNPAIRED, {}, True),
    "GRPO": ({"prompt": PROMPTS}, SAMPLED, True),
    "RLOO": ({"prompt": PROMPTS}, SAMPLED, True),
}


def train(kind, name, models, tokenizer, folder, lora=False, **more):
    """-> the trainer, after STEPS."""
    data, settings, _ = KINDS[kind]
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": STEPS, "logging_steps": 1,
        "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "seed": 3,
        "gradient_checkpointing": False, "disable_tqdm": True, **settings, **more,
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
        trainer = getattr(trl, f"{kind}Trainer")(
            model, args=getattr(trl, f"{kind}Config")(**settings), **given
        )
        trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def both(*args, **more):
    own = train(*args, **more)
    with use_gem_kernels():
        return own, train(*args, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_losses(kind, models, tokenizer, tmp_path, counted):
    own, ours = both(kind, "dense", models, tokenizer, tmp_path)
    assert len(losses(own)) == STEPS and any(losses(own))
    for a, b in zip(losses(own), losses(ours)):
        assert abs(a - b) <= 1e-5 * max(1.0, abs(a))
    for a, b in zip(own.model.parameters(), ours.model.parameters()):
        assert_near(b, a, 1e-3)
    assert counted and any(counted) == KINDS[kind][2]
    if kind in ("GRPO", "RLOO", "KTO"):
        assert all(counted)

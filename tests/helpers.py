"""What several test files of gem use: a tokenizer and a model made in a moment, rollouts, runs of two processes."""

from __future__ import annotations

import collections
import functools
import json
from pathlib import Path

import gguf
import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gem.config.settings import OptimizerSettings, TextSettings
from gem.data.prompts import text_format
from gem.model.forward import Policy
from gem.rollout.sample import given_completions
from gem.update.optimizer import StepResult, Trainer
from tests import processes

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Besides the 256 bytes: merges that put the marker's end and the answer's beginning into one token.
MERGES = [("F", "i"), ("Fi", "n"), (":", "Ġ"), (":Ġ", "4"), ("e", "r"), ("Ġ", "1")]


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte a token, a few merges, <|im_start|>, <|im_end|> (eos) and <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = chat_template
    return fast


def tiny_model(seed: int = 0, vocab_size: int = 272, context: int = 512, scale: float = 0.3) -> LlamaForCausalLM:
    """Two layers, random; `scale` makes its distributions uneven enough for samples and scores to differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, tie_word_embeddings=True, initializer_range=scale,
        bos_token_id=None, eos_token_id=tiny_tokenizer().eos_token_id, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def save_tiny(directory: Path, **arguments) -> Path:
    """The tiny model and its tokenizer as a directory that `from_pretrained` opens."""
    tiny_model(**arguments).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def write_gguf(path, model, tokenizer):
    """The tiny Llama as a GGUF file, its tensors under llama.cpp's names (query and key rows interleaved)."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    special = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([special[0] if t.startswith("<") and len(t) > 1 else special[1] for t in tokens])
    writer.add_token_merges([f"{a} {b}" for a, b in MERGES])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for key, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if key in name:
                value = value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@functools.cache
def cpu() -> Accelerator:
    """Not made on import: a fork makes one of its own, from its own environment."""
    return Accelerator(cpu=True)


TOKENIZER = tiny_tokenizer()


END = TOKENIZER.eos_token_id
FORM = text_format(TOKENIZER, TextSettings())


TEXTS = (
    "2 + 2 = 4\nFinal Answer: 4",
    "Final Answer: 5",
    "hm",
    "so it is\nFinal Answer: 12",
    "no",
    "x\nFinal Answer: 1",
)


def encode(text):
    return tuple(TOKENIZER.encode(text))


def rollout_of(num_prompts=4, size=2):
    prompts = [encode(f"question {i} " + "?" * i) for i in range(num_prompts)]
    rows = [(*encode(TEXTS[i % len(TEXTS)] + "!" * i), END) for i in range(num_prompts * size)]
    return given_completions(FORM, prompts, rows)


def trainer_of(model, *, learning_rate=1e-3, total_steps=1, **settings):
    settings = OptimizerSettings(**settings)
    return Trainer(Policy(model), cpu(), settings, learning_rate=learning_rate, total_steps=total_steps)


class Recorder(Trainer):
    """A trainer that keeps the gradient of its last step and takes none."""

    def __init__(self, model, **settings):
        super().__init__(Policy(model), cpu(), OptimizerSettings(**settings), learning_rate=1e-3, total_steps=1)

    def step(self):
        self.gradient = torch.cat([p.grad.flatten() for p in self.model.parameters()])
        self.model.zero_grad()
        loss, self._loss = float(self._loss), None
        return StepResult(loss, float(self.gradient.norm()), self.learning_rate)


# An odd number of prompts and micro-batches: the processes' shares differ.
RUN = {
    "num_generations": 2, "max_completion_length": 6, "max_steps": 3, "prompts_per_step": 3, "micro_batch_size": 1,
    "sft_epochs": 1, "sft_batch_size": 5, "sft_learning_rate": 3e-3, "learning_rate": 1e-3, "eval_generate": 3,
    "eval_sample": 3, "system_prompt": "Think.", "device": "cpu", "save_steps": 2, "log_completions_steps": 1,
    "beta": 0.1, "num_iterations": 2, "epsilon": 0.2,
}  # fmt: skip


LORA = {"use_peft": True, "lora_r": 4}


TIMES = ("step_time", "eval/seconds")


# At DPO's first step the policy is its reference: every margin is a tie, up to rounding.
TIES = ("rewards/accuracies",)


def settings(folder, name, **more):
    paths = {"model": folder / "model", "train_file": folder / "pairs.jsonl", "output_dir": folder / name}
    return {**RUN, **{key: str(path) for key, path in paths.items()}, **more}


def launch(path, *flags, **environment):
    """Two processes of `gem train`; their output."""
    return processes.run_ranks(2, processes.gem, "train", path, *flags, environment=environment)


def rows(run_dir, file="metrics.jsonl"):
    lines = [json.loads(line) for line in (run_dir / file).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in lines]


def saved_weights(run_dir):
    """Bytes of each file of the model that a run saved."""
    return {path.name: path.read_bytes() for path in (run_dir / "model").glob("*.safetensors")}


class Killed(BaseException):
    """Nothing catches it: the process is gone."""


def assert_close(one, other, tolerance=1e-3):
    """Rows of metrics: no number is further off than `tolerance` times the largest of its name and stage."""
    assert len(one) == len(other)
    sizes = collections.defaultdict(float)
    for row in one:
        for key, value in row.items():
            if isinstance(value, float):
                sizes[row.get("stage"), key] = max(sizes[row.get("stage"), key], abs(value))
    for a, b in zip(one, other):
        assert a.keys() == b.keys()
        for key, value in ((k, v) for k, v in a.items() if k not in TIES):
            size = sizes.get((a.get("stage"), key))
            if size is None:
                assert_near(b[key], value, key)
            else:
                assert b[key] == pytest.approx(value, rel=0, abs=tolerance * size), key


def assert_same_weights(one, two, rate=RUN["learning_rate"]):
    """Two trained models, in steps of AdamW: where a gradient is near 0, rounding decides its sign, and the step's."""
    assert one.keys() == two.keys()
    apart = {key: (one[key] - two[key]).float() for key in one}
    for key, difference in apart.items():
        assert difference.square().mean().sqrt() < 0.1 * rate, key
    assert torch.cat([difference.flatten() for difference in apart.values()]).square().mean().sqrt() < 0.005 * rate


def assert_near(found, value, key):
    """Floats, in lists and dictionaries too, up to rounding; all else the same."""
    if isinstance(value, dict):
        assert found.keys() == value.keys(), key
        for name in value:
            assert_near(found[name], value[name], f"{key}/{name}")
    elif isinstance(value, list):
        assert len(found) == len(value), key
        for i, part in enumerate(value):
            assert_near(found[i], part, f"{key}[{i}]")
    else:
        assert found == (pytest.approx(value, rel=2e-3, abs=2e-4) if isinstance(value, float) else value), key

"""The small model, the pairs and the settings of the tests of vLLM."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gem.config.read import build_config
from gem.config.settings import Lora
from gem.demo.arithmetic import arithmetic_pairs
from gem.files import write_jsonl
from gem.model.lora import add_lora
from tests.helpers import tiny_tokenizer

PROMPTS = [[1, 2, 3], [7, 8, 9, 10], [5] * 300]  # the last fills blocks of the prefix cache
RUN = {
    "num_generations": 2, "max_completion_length": 10, "max_steps": 2, "prompts_per_step": 4, "micro_batch_size": 2,
    "sft_epochs": 2, "sft_batch_size": 4, "sft_learning_rate": 3e-3, "learning_rate": 1e-3, "eval_generate": 0,
    "eval_sample": 2, "system_prompt": "Think.", "device": "cpu", "log_completions_steps": 1,
}  # fmt: skip


def small_model(seed=0, tied=True):
    """Like helpers', with a head that vLLM has kernels for."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=272, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=tied, initializer_range=0.3,
        bos_token_id=None, eos_token_id=tiny_tokenizer().eos_token_id, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def with_adapter(model, seed=0):
    """The model under a LoRA adapter that changes it."""
    torch.manual_seed(seed)
    adapted = add_lora(model, Lora(lora_r=4, lora_target_modules="q_proj,down_proj")).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return adapted


def fill_folder(folder):
    """A model directory and a pairs file."""
    small_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(16))
    return folder


def settings(folder, name, **more):
    paths = {"model": folder / "model", "train_file": folder / "pairs.jsonl", "output_dir": folder / name}
    return build_config({**RUN, **{key: str(path) for key, path in paths.items()}, **more})


def server_fields(url):
    return {"use_vllm": True, "vllm_mode": "server", "vllm_server_url": url}


def server_settings(url):
    return bare_settings(**server_fields(url))


def bare_settings(**fields):
    """A configuration of which nothing but these is looked at."""
    return build_config({"model": "m", "train_file": "f", "output_dir": "o", **fields})

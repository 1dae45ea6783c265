"""Models: where they are found, how GGUF comes in and safetensors goes out, and which tokens end an answer."""

import gguf
import pytest
import torch
from gem_tiny import MERGES, save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from gem.errors import UserError
from gem.model import (
    ModelSource,
    context_length,
    end_token_ids,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    save_pretrained,
)


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


def test_gguf_in_safetensors_out(tmp_path):
    (tmp_path / "gguf").mkdir()
    model = tiny_model()
    write_gguf(tmp_path / "gguf" / "tiny.gguf", model, tiny_tokenizer())
    source = find_model(str(tmp_path / "gguf"))
    assert source == find_model(str(tmp_path / "gguf" / "tiny.gguf"))
    config = load_config(source)
    assert context_length(config) == 512
    loaded, tokenizer = load_model(source, config, device="cpu"), load_tokenizer(source)
    ids = torch.tensor([tiny_tokenizer().encode("2 + 2 = 4")])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert tokenizer.decode(tokenizer.encode("Final Answer: 漢4")) == "Final Answer: 漢4"
    assert tokenizer.eos_token_id == tiny_tokenizer().eos_token_id

    save_pretrained(loaded, tokenizer, tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, loaded(ids).logits)
    assert load_tokenizer(find_model(str(tmp_path / "saved"))).chat_template == tokenizer.chat_template


def test_every_end_token_counts():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    eos = tokenizer.eos_token_id
    assert end_token_ids(model, tokenizer) == (eos,)
    model.generation_config.eos_token_id = [3, 7]
    model.config.eos_token_id = 5
    assert end_token_ids(model, tokenizer, 9) == tuple(sorted([3, 5, 7, 9, eos]))
    model.generation_config.eos_token_id = None
    assert end_token_ids(model, tokenizer) == tuple(sorted([5, eos]))


def test_where_a_model_is(tmp_path):
    save_tiny(tmp_path / "model")
    assert find_model(str(tmp_path / "model")) == ModelSource(str(tmp_path / "model"), None)
    assert find_model("owner/name") == ModelSource("owner/name", None)
    assert find_model("owner/name").arguments == {"trust_remote_code": False}
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).touch()
    with pytest.raises(UserError, match=r"2 \.gguf files"):
        find_model(str(tmp_path / "two"))
    with pytest.raises(UserError, match="no such file"):
        find_model(str(tmp_path / "none"))
    (tmp_path / "weights.bin").touch()
    with pytest.raises(UserError, match=r"expected a directory or a \.gguf file"):
        find_model(str(tmp_path / "weights.bin"))


def test_pickled_weights_are_refused(tmp_path):
    save_tiny(tmp_path / "model")
    torch.save(tiny_model().state_dict(), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    source = find_model(str(tmp_path / "model"))
    with pytest.raises(UserError, match="cannot load") as error:
        load_model(source, load_config(source), device="cpu")
    assert "\n" not in str(error.value)


def test_a_broken_gguf_is_one_line(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(UserError, match=r"cannot load x\.gguf") as error:
        load_tokenizer(find_model(str(tmp_path / "x.gguf")))
    assert "\n" not in str(error.value)

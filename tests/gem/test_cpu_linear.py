"""Products with few rows: the numbers of nn.Linear, only while it is asked for, and only where that is right."""

import dataclasses

import pytest
import torch
from torch import nn

from gem.config.settings import Lora, Sampling, TextSettings
from gem.data.prompts import text_format
from gem.model.forward import Policy
from gem.model.lora import add_lora
from gem.rollout import cpu_linear
from gem.rollout.cpu_linear import MOST_ROWS, few_row_products
from gem.rollout.sample import roll_out
from tests.helpers import tiny_model, tiny_tokenizer
from tests.kernels.helpers import assert_near

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def quick(monkeypatch):
    """The number of products that were taken the quicker way."""
    calls = []
    monkeypatch.setattr(cpu_linear, "_product", lambda *a, real=cpu_linear._product: calls.append(a) or real(*a))
    return calls


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 37), (3, 37), (MOST_ROWS, 1, 37), (2, 4, 37)])
def test_few_rows_are_the_product_in_float64(shape, bias, quick):
    torch.manual_seed(0)
    layer = nn.Linear(37, 53, bias=bias)
    x = torch.randn(shape)
    truth = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with torch.no_grad(), few_row_products(layer):
        out = layer(x)
    assert len(quick) == 1 and out.is_contiguous() and out.shape == truth.shape
    assert_near(out.double(), truth, 1e-6)


@pytest.mark.parametrize("rows, dtype", [(1, torch.float32), (MOST_ROWS + 1, torch.float32), (4, torch.bfloat16)])
def test_the_rest_is_left_to_torch(rows, dtype, quick):
    layer = nn.Linear(8, 8).to(dtype)
    x = torch.randn(rows, 8, dtype=dtype)
    with torch.no_grad():
        before = layer(x)
        with few_row_products(layer):
            assert torch.equal(layer(x), before)
        assert not quick and layer(torch.randn(0, 8, dtype=dtype)).shape == (0, 8)


def test_gradients_are_torchs_own(quick):
    layer, x = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    with few_row_products(layer):
        layer(x).sum().backward()
    assert_near(x.grad, layer.weight.detach().sum(0).expand(4, 8), 1e-6)
    assert not quick


def test_the_model_is_as_before_after_an_error():
    class Own(nn.Linear):
        """A kind of its own, as quantized layers are."""

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4), nn.Linear(4, 4))
    model[2].forward = lambda x: x  # another library's
    theirs = model[2].forward
    with pytest.raises(KeyError), few_row_products(model):
        assert "forward" in vars(model[0]) and "forward" not in vars(model[1]) and model[2].forward is theirs
        raise KeyError
    assert "forward" not in vars(model[0]) and model[2].forward is theirs


@pytest.mark.parametrize("lora", [False, True])
def test_a_rollout_samples_through_it(lora, quick, monkeypatch):
    model = add_lora(tiny_model(), Lora(lora_r=4)) if lora else tiny_model()
    prompts = [TOKENIZER.encode(text) for text in ("a", "What is 2 + 2?")]

    form = dataclasses.replace(text_format(TOKENIZER, TextSettings()), end_tokens=())

    def sample():
        sampling = Sampling(num_generations=2, max_completion_length=12)
        return roll_out(Policy(model), form, prompts, sampling, seed=3, batch_size=2, stats_temperature=1.0)

    found = sample()
    assert len(quick) > 12  # a product a token at the least
    monkeypatch.setattr(cpu_linear, "MOST_ROWS", 0)
    plain = sample()
    assert torch.equal(found.batch.completion_ids, plain.batch.completion_ids)
    assert_near(found.logprobs, plain.logprobs)

"""`skip_logits`: the same loss and gradients as with logits, for every head and label."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import set_seed

from cumulant.bench.speed import memory
from cumulant.models import CumulantForMaskedLM, from_preset, quantize
from cumulant.ops import cross_entropy

from .common import build, tokens

HEADS = {
    "tied": {},
    "bias": {"logits_bias": True, "tie_word_embeddings": False},
    "logit_ffn": {"logit_ffn": 20},
}


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(cross_entropy, "PIECE", 0)
    monkeypatch.setattr(cross_entropy, "FEWEST", 7)


def run(model, **arguments):
    """The loss and all gradients."""
    model.zero_grad()
    outputs = model(**arguments)
    outputs.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return outputs, grads


def assert_same(model, **arguments):
    """With and without logits, to the last digits of fp32, as the loss with logits is."""
    usual, expected = run(model, **arguments)
    ours, grads = run(model, skip_logits=True, **arguments)
    assert usual.logits is not None
    assert ours.logits is None
    assert ours.loss.item() == pytest.approx(usual.loss.item(), rel=1e-6)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert torch.allclose(grad, expected[name], rtol=1e-5, atol=1e-6), name


IDS = tokens(3, 20)
LABELS = torch.where(IDS % 4 == 0, -100, IDS)
CALLS = {
    "labels": {"labels": LABELS},
    "labels already shifted": {"shift_labels": LABELS},
    "items of a larger batch": {"labels": LABELS, "num_items_in_batch": torch.tensor(91)},
    "positions": {"labels": LABELS, "position_ids": torch.arange(20).remainder(8).expand(3, -1)},
    "documents and items": {
        "labels": LABELS,
        "seq_idx": torch.arange(20).div(6, rounding_mode="floor").expand(3, -1),
        "num_items_in_batch": 91,
    },
    "padding": {
        "labels": LABELS,
        "attention_mask": (torch.arange(20) > torch.tensor([[-1], [4], [9]])).long(),
    },
    "last tokens": {"labels": LABELS[:, -6:], "logits_to_keep": 6},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("head", HEADS)
def test_same_loss_and_gradients(head, call):
    assert_same(build("taylor", **HEADS[head]).train(), input_ids=IDS, **CALLS[call])


@pytest.mark.parametrize("preset", ["softmax", "elita", "flash", "gated_taylor"])
def test_other_models(preset):
    assert_same(build(preset).float().train(), input_ids=IDS, labels=LABELS)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the method's name since transformers 5.23
def test_gradient_checkpointing():
    model = build("taylor").train()
    model.gradient_checkpointing_enable()
    assert_same(model, input_ids=IDS, labels=LABELS)


@pytest.mark.parametrize("head", HEADS)
def test_autocast(head):
    """As near to float64 as with logits, in loss and gradients."""
    model = build("taylor", **HEADS[head]).train()
    exact, expected = run(model, input_ids=IDS, labels=LABELS)
    model.float()
    errors = []
    for skip in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            found, grads = run(model, input_ids=IDS, labels=LABELS, skip_logits=skip)
        assert all(grad.dtype == torch.float32 for grad in grads.values())
        difference = sum(float((grads[n].double() - g).square().sum()) for n, g in expected.items())
        errors.append((abs(found.loss.item() - exact.loss.item()), difference**0.5))
    assert errors[1][0] < 1.2 * errors[0][0] + 1e-5
    assert errors[1][1] < 1.2 * errors[0][1]


def test_scaled_gradients_in_fp16():
    """Under fp16 with a gradient scaler gradients are as near as with logits."""
    model = build("taylor").train()
    _, expected = run(model, input_ids=IDS, labels=LABELS)
    model.float()
    scale, errors = 2.0**14, []
    for skip in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        model.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(input_ids=IDS, labels=LABELS, skip_logits=skip).loss
        scaler.scale(loss).backward()
        scaler.unscale_(torch.optim.SGD(model.parameters()))
        grads = {n: p.grad for n, p in model.named_parameters()}
        difference = sum(float((grads[n].double() - g).square().sum()) for n, g in expected.items())
        errors.append(difference**0.5)
    assert errors[1] < 1.2 * errors[0]


def test_frozen_and_changed_heads():
    """A frozen head has no gradient; layers in the head's place are called; so are hooks."""
    model = build("taylor", tie_word_embeddings=False).train()
    model.lm_head.requires_grad_(False)
    assert_same(model, input_ids=IDS, labels=LABELS)
    assert model.lm_head.weight.grad is None
    model.lm_head = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 50)).double()
    assert_same(model, input_ids=IDS, labels=LABELS)
    calls = []
    hooked = build("taylor").train()
    hooked.lm_head.register_forward_hook(lambda *_: calls.append(1))
    assert_same(hooked, input_ids=IDS, labels=LABELS)
    assert len(calls) > 2


def test_logits_of_a_subclass_or_an_instance():
    """A method `logits` in the place of ours, such as a cap, is used."""
    model = build("taylor").train()
    uncapped = model(IDS, labels=LABELS, skip_logits=True).loss
    own = model.logits
    model.logits = lambda hidden: 2 * torch.tanh(own(hidden) / 2)
    assert_same(model, input_ids=IDS, labels=LABELS)
    assert model(IDS, labels=LABELS, skip_logits=True).loss != uncapped


def test_a_loss_function_of_the_users():
    model = build("taylor").train()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    assert_same(model, input_ids=IDS, labels=LABELS)


def test_resized_embeddings():
    model = build("taylor").train()
    model.resize_token_embeddings(61)
    assert_same(model, input_ids=IDS, labels=LABELS.where(LABELS < 0, LABELS + 11))


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_heads(bits):
    model = quantize(build("taylor", hidden_size=64, vocab_size=64).float(), bits).eval()
    with torch.no_grad():
        usual = model(IDS, labels=LABELS).loss
        ours = model(IDS, labels=LABELS, skip_logits=True)
    assert ours.logits is None
    assert torch.allclose(ours.loss, usual, rtol=1e-6)


def test_masked_model():
    options = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50, "group_size": 5}
    set_seed(0)
    config = from_preset("flash", is_causal=False, query_key_dim=12, **options)
    model = CumulantForMaskedLM(config).double().train()
    assert_same(model, input_ids=IDS, labels=LABELS)
    assert_same(model, input_ids=IDS, labels=LABELS, num_items_in_batch=torch.tensor(91))
    with pytest.raises(ValueError, match="skip_logits: without labels"):
        model(IDS, skip_logits=True)


def test_transforms_get_all_logits():
    """`torch.func` differentiates the usual way."""
    model = build("taylor").train()
    weights = dict(model.named_parameters())

    def loss(weights, skip):
        call = {"labels": LABELS, "skip_logits": skip}
        return torch.func.functional_call(model, weights, (IDS,), call).loss

    ours, usual = (torch.func.grad(loss)(weights, skip) for skip in (True, False))
    for name, grad in ours.items():
        assert torch.allclose(grad, usual[name], rtol=1e-5, atol=1e-6), name


def test_compiled():
    model = build("taylor", num_hidden_layers=1).float().train()
    _, expected = run(model, input_ids=IDS, labels=LABELS, skip_logits=True)
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    compiled(input_ids=IDS, labels=LABELS, skip_logits=True).loss.backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, expected[name], rtol=1e-4, atol=1e-5), name


def test_mistakes():
    model = build("taylor")
    with pytest.raises(ValueError, match="skip_logits: without labels"):
        model(IDS, skip_logits=True)
    with pytest.raises(ValueError, match="shift_labels: expected 60, one for each"):
        model(IDS, shift_labels=LABELS[:, 1:], skip_logits=True)
    with pytest.raises(ValueError, match=r"labels: expected \[3, 20\]"):
        model(IDS, labels=LABELS[:, 1:], skip_logits=True)
    with pytest.raises(TypeError, match="did you mean 'skip_logits'"):
        model(IDS, labels=LABELS, skip_logit=True)
    assert len(model(IDS, labels=LABELS, skip_logits=True, use_cache=False, return_dict=False)) == 1


def test_thirty_steps_have_the_same_losses():
    curves = []
    for skip in (False, True):
        model = build("taylor", initializer_range=0.02).float().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        generator, losses = torch.Generator().manual_seed(0), []
        for _ in range(30):
            ids = torch.randint(10, (4, 24), generator=generator).cumsum(1) % 50
            loss = model(ids, labels=ids, skip_logits=skip).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[1][-1] < 0.9 * curves[1][0]


MEMORY = """
import torch
from cumulant.bench.speed.memory import peak_memory
from cumulant.models import CumulantForCausalLM, from_preset
model = CumulantForCausalLM(from_preset("taylor", vocab_size=32_000, hidden_size=64,
    num_hidden_layers=1, num_attention_heads=2))
ids = torch.randint(32_000, (1, TOKENS))
with peak_memory("cpu") as peak:
    model(ids, labels=ids, skip_logits=SKIP, use_cache=False).loss.backward()
    print(peak())
"""


def peak_bytes(tokens, skip):
    """The most memory that a step adds, in a process of its own."""
    script = MEMORY.replace("TOKENS", str(tokens)).replace("SKIP", str(skip))
    command = [sys.executable, "-c", script]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not memory._CLEAR.exists(), reason="the system does not tell peaks")
def test_memory_is_an_eighth():
    """At 32,000 tokens in the vocabulary and 4,096 in the window."""
    assert peak_bytes(4096, True) < peak_bytes(4096, False) / 8

"""PEFT's methods on models of every kind: targets, training, cached decoding, saving, merging."""

import pytest
import torch

peft = pytest.importorskip("peft")

from transformers import AutoModelForCausalLM  # noqa: E402

from cumulant.models import (  # noqa: E402
    CumulantForSequenceClassification,
    CumulantForTokenClassification,
)
from cumulant.ops import cross_entropy  # noqa: E402

from .common import KINDS, PEERS, build, checkpoint, config, tokens  # noqa: E402

# PEFT calls what transformers has deprecated, and says that tied embeddings are tied
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")

TOKENS = sorted(set(tokens(2, 7).flatten().tolist()))
CAUSAL = {"task_type": "CAUSAL_LM"}
METHODS = {
    "lora": lambda: peft.LoraConfig(r=4, **CAUSAL),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, **CAUSAL),
    "all linear": lambda: peft.LoraConfig(r=4, target_modules="all-linear", **CAUSAL),
    "saved modules": lambda: peft.LoraConfig(r=4, modules_to_save=["norm"], **CAUSAL),
    "embeddings": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens"], **CAUSAL),
    "ia3": lambda: peft.IA3Config(**CAUSAL),
    "vera": lambda: peft.VeraConfig(r=4, projection_prng_key=0, save_projection=True, **CAUSAL),
    "loha": lambda: peft.LoHaConfig(r=4, **CAUSAL),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, **CAUSAL),
    "trainable tokens": lambda: peft.TrainableTokensConfig(token_indices=TOKENS, **CAUSAL),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=16, **CAUSAL
    ),
}
FEW = ["llama", "taylor", "based", "flash", "elita", "gated_taylor"]


def adapted(kind, method, **fields):
    """A model with an adapter whose every weight is away from its start."""
    torch.manual_seed(0)
    model = peft.get_peft_model(build(kind, **fields), METHODS[method]())
    with torch.no_grad():
        for _, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            p.add_(
                torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.1
            )
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", FEW)
def test_every_method(kind, method):
    """Every adapter weight has a gradient and an effect, with and without a cache."""
    model, ids = adapted(kind, method), tokens(2, 7)
    model.train()
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name
    model.eval()
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    cached = model.generate(**options)
    assert torch.equal(cached, model.generate(**options, use_cache=False))
    assert not torch.allclose(
        model(input_ids=ids).logits[:, -7:], build(kind)(ids).logits, atol=1e-3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_layers_are_adapted(kind):
    """Each adapter alone changes the output and the cache: no code goes round a layer."""
    ids = tokens(1, 9)
    model = peft.get_peft_model(build(kind), METHODS["all linear"]()).eval()
    plain = model(input_ids=ids).logits.detach()
    adapters = [m for m in model.modules() if hasattr(m, "lora_B") and len(m.lora_B)]
    assert (
        len(adapters) == sum(isinstance(m, torch.nn.Linear) for m in build(kind).modules()) - 1
    )  # not the logits
    for adapter in adapters:
        weight = adapter.lora_B["default"].weight
        with torch.no_grad():
            weight.normal_()
            whole = model(input_ids=ids).logits
            assert not torch.allclose(whole, plain, atol=1e-4), adapter
            cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
            steps = [
                model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits
                for t in range(4, 9)
            ]
            assert torch.allclose(torch.cat(steps, 1), whole[:, 4:], atol=2e-3, rtol=1e-3), adapter
            weight.zero_()


@pytest.mark.parametrize("kind", PEERS)
def test_default_targets(kind):
    """LoRA finds queries and values in every kind of layer, even if built before its import."""
    peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.pop("cumulant", None)
    model = peft.get_peft_model(build(kind), METHODS["lora"]())
    for i, layer in enumerate(model.base_model.model.model.layers):
        assert any("lora_A" in name for name, _ in layer.named_parameters()), i


@pytest.mark.parametrize("kind", FEW)
def test_training_with_checkpointing_saving_and_merging(kind, tmp_path):
    model, ids = adapted(kind, "lora"), tokens(2, 8)
    model.train()
    model.enable_input_require_grads()
    checkpoint(model.base_model.model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(build(kind), tmp_path / "adapter").eval()
    assert torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-5)
    merged = loaded.merge_and_unload()
    assert torch.allclose(merged(ids).logits, expected, atol=1e-3, rtol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(again(ids).logits, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "taylor"])
def test_new_embeddings(kind):
    """Embedding and logits trained whole, and a vocabulary that grew."""
    model = build(kind, tie_word_embeddings=False)
    model.resize_token_embeddings(260)
    whole = peft.LoraConfig(r=4, modules_to_save=["embed_tokens", "lm_head"], **CAUSAL)
    model = peft.get_peft_model(model, whole)
    ids = tokens(2, 6, high=260)
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [
        n
        for n, p in model.named_parameters()
        if p.requires_grad and p.grad.abs().sum() > 0 and "lora" not in n
    ]
    assert any("embed_tokens" in n for n in trained)
    assert any("lm_head" in n for n in trained)


@pytest.mark.parametrize(
    "head", [CumulantForSequenceClassification, CumulantForTokenClassification]
)
@pytest.mark.parametrize("kind", ["taylor", "flash"])
def test_heads(kind, head):
    ids = tokens(2, 6)
    if head is CumulantForSequenceClassification:
        labels, methods = torch.tensor([0, 2]), [peft.LoraConfig(task_type="SEQ_CLS", r=4)]
        methods.append(peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    else:
        labels, methods = ids % 3, [peft.LoraConfig(task_type="TOKEN_CLS", r=4)]
    for settings in methods:
        model = peft.get_peft_model(head(config(kind, num_labels=3)), settings)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_prefix_tuning_is_for_softmax():
    """It writes keys and values into the cache, so models that keep none refuse it."""
    settings = {
        "num_virtual_tokens": 3,
        "num_layers": 2,
        "token_dim": 32,
        "num_attention_heads": 4,
        **CAUSAL,
    }
    ids = tokens(2, 6)
    for kind in ("llama", "softmax"):
        model = peft.get_peft_model(build(kind), peft.PrefixTuningConfig(**settings))
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        options = {"input_ids": ids, "max_new_tokens": 4, "do_sample": False}
        assert model.eval().generate(**options).shape == (2, 10)
    model = peft.get_peft_model(build("taylor"), peft.PrefixTuningConfig(**settings))
    with pytest.raises(
        TypeError,
        match="past_key_values: layer 0 is a DynamicLayer .* cannot hold this model's state",
    ):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)


@pytest.mark.parametrize("targets", ["lm_head", "all-linear", "q_proj"])
def test_the_loss_without_logits(targets, monkeypatch):
    """An adapter at the head, in pieces, or elsewhere, with a frozen head."""
    monkeypatch.setattr(cross_entropy, "PIECE", 0)
    monkeypatch.setattr(cross_entropy, "FEWEST", 5)
    names = targets if targets == "all-linear" else [targets]
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False, **CAUSAL)
    model, ids = peft.get_peft_model(build("taylor"), lora), tokens(2, 12)
    results = []
    for skip in (False, True):
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, skip_logits=skip).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) > 2
    for usual, ours in zip(*results, strict=True):
        assert torch.allclose(usual, ours.to(usual.dtype), rtol=1e-5, atol=1e-6)

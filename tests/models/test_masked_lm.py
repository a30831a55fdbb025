"""The encoder: masks, packing, both directions, saving, and learning to fill gaps."""

import pytest
import torch
from transformers import AutoModelForMaskedLM, set_seed

from cumulant.models import CumulantConfig, CumulantForCausalLM, CumulantForMaskedLM, from_preset

from .common import tokens

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "vocab_size": 50,
    "group_size": 5,
    "query_key_dim": 12,
}
KINDS = {
    "flash": {},
    "layernorm": {
        "norm": "layernorm",
        "gated_activation": "laplace",
        "reduce_group_non_causal_attn": False,
    },
    "mixed": {
        "mixers": ["softmax", "linear", "taylor", "gau", "flash"],
        "num_hidden_layers": 5,
        "feed_forward": "gelu",
    },
}


@pytest.fixture(params=KINDS)
def model(request):
    set_seed(0)
    options = {**SMALL, "is_causal": False, "initializer_range": 0.3, **KINDS[request.param]}
    return CumulantForMaskedLM(from_preset("flash", **options)).double().eval()


def test_masked_tokens_do_not_exist(model):
    """With padding anywhere, of any ids, logits are those of each row alone."""
    ids, mask = tokens(3, 22), torch.ones(3, 22, dtype=torch.long)
    mask[0, :9], mask[1, 15:], mask[2, 4:9] = 0, 0, 0
    logits = model(ids, attention_mask=mask).logits
    other = model(torch.where(mask.bool(), ids, 7), attention_mask=mask).logits
    for row in range(3):
        kept = mask[row].bool()
        assert torch.allclose(logits[row, kept], other[row, kept], atol=1e-12)
        assert torch.allclose(
            logits[row, kept], model(ids[row : row + 1, kept]).logits[0], atol=1e-9
        )


def test_packed_is_separate(model):
    ids = tokens(1, 20)
    logits = model(ids, cu_seqlens=torch.tensor([0, 7, 20])).logits
    assert torch.allclose(logits[:, :7], model(ids[:, :7]).logits, atol=1e-9)
    assert torch.allclose(logits[:, 7:], model(ids[:, 7:]).logits, atol=1e-9)


def test_tokens_see_both_ways(model):
    ids = tokens(1, 20)
    for at, seen in ((19, 15), (0, 4)):
        changed = ids.clone()
        changed[0, at] = 1 if ids[0, at] != 1 else 2
        assert not torch.allclose(model(changed).logits[0, seen], model(ids).logits[0, seen])


def test_loss_is_of_the_labelled_places(model):
    ids, labels = tokens(2, 12), torch.full((2, 12), -100)
    labels[0, 3], labels[1, 8] = 11, 12
    outputs = model(ids, labels=labels)
    log = outputs.logits.float().log_softmax(-1)
    assert outputs.loss.item() == pytest.approx(
        -(log[0, 3, 11] + log[1, 8, 12]).item() / 2, rel=1e-5
    )
    assert model(ids, labels=labels, num_items_in_batch=5).loss.item() == pytest.approx(
        outputs.loss.item() * 2 / 5
    )


def test_saved_and_loaded(model, tmp_path):
    model = model.float()
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert type(again) is CumulantForMaskedLM
    ids = tokens(2, 11)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_it_learns_to_fill_gaps():
    """Every token comes twice, so a masked token equals one of its neighbours."""
    set_seed(0)
    config = from_preset(
        "flash", **{**SMALL, "is_causal": False, "num_hidden_layers": 2, "group_size": 8}
    )
    model = CumulantForMaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(250):
        ids = torch.randint(49, (16, 16)).repeat_interleave(2, 1)
        first = torch.rand(16, 16) < 0.5
        hidden = torch.stack((first, ~first), -1) & (
            torch.rand(16, 16, 1) < 0.4
        )  # one of a pair at most
        hidden = hidden.flatten(1)
        outputs = model(ids.masked_fill(hidden, 49), labels=ids.masked_fill(~hidden, -100))
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
    found = outputs.logits.argmax(-1) == ids
    for side in (0, 1):
        assert found[:, side::2][hidden[:, side::2]].float().mean() > 0.95


def test_each_form_refuses_the_other():
    with pytest.raises(
        ValueError,
        match="is_causal: an encoder sees later tokens; give the configuration is_causal=False",
    ):
        CumulantForMaskedLM(from_preset("flash", **SMALL))
    with pytest.raises(
        ValueError, match="is_causal: a causal language model cannot see later tokens"
    ):
        CumulantForCausalLM(from_preset("flash", **SMALL, is_causal=False))
    with pytest.raises(ValueError, match="mixers: sliding_window looks backwards only; an encoder"):
        CumulantConfig(mixers=["flash", "sliding_window"], is_causal=False)
    with pytest.raises(ValueError, match="conv_size: 4 looks backwards only; an encoder"):
        from_preset("taylor", is_causal=False)

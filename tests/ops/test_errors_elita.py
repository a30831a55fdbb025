"""Bad input of ELiTA attention, told as other operations tell it."""

import pytest
import torch

import cumulant as cm

from .arguments import elita_arguments, long, wide


def with_one(value, at=(1, 0, 3)):
    x = elita_arguments()["key_logit"].clone()
    x[at] = value
    return x


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"key_logit": 3}, TypeError, r"key_logit: expected a tensor \[B, H, T\], got int"),
        ({"key_logit": wide(2, 2, 37, 1)}, ValueError,
         r"key_logit: expected \[B, H, T\], got \[2, 2, 37, 1\]"),
        ({"value": wide(2, 2, 37)}, ValueError,
         r"value: expected \[B, G, T, V\], got \[2, 2, 37\]"),
        ({"value": long(2, 2, 37, 3)}, TypeError,
         r"value: expected fp16, bf16, fp32 or fp64, got torch.int64"),
        ({"key_logit": wide(2, 2, 36)}, ValueError,
         r"key_logit: expected \[B, G, T\] = \[2, 2, 37\] as in value, got \[2, 2, 36\]"),
        ({"value": wide(2, 2, 30, 3)}, ValueError,
         r"key_logit: expected \[B, G, T\] = \[2, 2, 30\] as in value, got \[2, 2, 37\]"),
        ({"query_logit": wide(2, 4, 36)}, ValueError,
         r"query_logit: expected \[B, H, T\] = \[2, 4, 37\], T as in value, got \[2, 4, 36\]"),
        ({"self_logit": wide(2, 2, 37)}, ValueError,
         r"self_logit: expected \[B, H, T\] = \[2, 4, 37\], T as in value, got \[2, 2, 37\]"),
        ({"self_logit": wide(2, 4, 37, dtype=torch.float32)}, TypeError,
         r"self_logit: expected key_logit's dtype, torch.float64, got torch.float32"),
        ({"value": wide(2, 3, 37, 3), "key_logit": wide(2, 3, 37)}, ValueError,
         r"key_logit: the 3 key/value heads \(G\) must divide the 4 query heads"),
        ({"key_logit": with_one(float("nan"))}, ValueError,
         r"key_logit: expected logits below \+inf, -inf for no weight, got nan; an earlier layer"),
        ({"key_logit": with_one(float("inf"))}, ValueError,
         r"key_logit: expected logits below \+inf, .* got inf"),
        ({"query_logit": wide(2, 4, 37) - float("inf")}, ValueError,
         r"query_logit: expected logits finite, got -inf"),
        ({"self_logit": wide(2, 4, 37) * float("nan")}, ValueError,
         r"self_logit: expected logits below \+inf, .* got nan"),
        ({"key_mask": torch.ones(2, 36).bool()}, ValueError,
         r"key_mask: expected \[B, S\] = \[2, 37\], got \[2, 36\]"),
        ({"cu_seqlens": torch.tensor([0, 37])}, ValueError,
         r"cu_seqlens: packed sequences need B = 1"),
        ({"state": (1, 2)}, TypeError,
         r"state: expected a ElitaState from return_state=True, got tuple"),
        ({"impl": "cuda"}, ValueError, r"impl: expected 'auto', .* got 'cuda'"),
    ],
)  # fmt: skip
def test_elita_attention(change, kind, message):
    arguments = elita_arguments() | change
    with pytest.raises(kind, match=message):
        cm.elita_attention(**arguments)
    with pytest.raises(kind, match=message):
        cm.explain(cm.elita_attention, **arguments)


def test_elita_states_of_another_call():
    _, state = cm.elita_attention(**elita_arguments(), return_state=True)
    with pytest.raises(
        ValueError, match=r"state: expected log_weight \[1, 2\], got \[2, 2\]; the state comes from"
    ):
        cm.elita_attention(**{name: x[:1] for name, x in elita_arguments().items()}, state=state)
    with pytest.raises(ValueError, match=r"state: expected mean \[2, 2, 1\], got \[2, 2, 3\]"):
        cm.elita_attention(
            **elita_arguments() | {"value": elita_arguments()["value"][..., :1]}, state=state
        )
    low = cm.ElitaState(state.log_weight, state.mean.float(), state.position)
    with pytest.raises(
        TypeError, match=r"state: expected torch.float64 on cpu, got torch.float32 on cpu"
    ):
        cm.elita_attention(**elita_arguments(), state=low)


def test_what_is_masked_may_be_nan():
    """Masked logits are not checked."""
    arguments = elita_arguments()
    mask = torch.rand(2, 37) > 0.5
    plain = cm.elita_attention(**arguments, key_mask=mask)
    hidden = {
        name: x.masked_fill(~mask.view(2, 1, 37, *[1] * (x.dim() - 3)), float("nan"))
        for name, x in arguments.items()
    }
    assert torch.equal(cm.elita_attention(**hidden, key_mask=mask), plain)

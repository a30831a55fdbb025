"""Packed documents give what each gives alone, however a client marks them."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from cumulant.models import CumulantForMaskedLM

from .common import KINDS, PEERS, TOKENIZER, build, checkpoint, config, tokens

LENGTHS = (7, 1, 12, 4)


def documents(lengths=LENGTHS):
    return [tokens(1, n, seed=n) for n in lengths]


def positions(lengths=LENGTHS, start=0):
    return torch.cat([torch.arange(start, start + n) for n in lengths])[None]


def numbers(lengths=LENGTHS):
    return torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]


def offsets(lengths=LENGTHS):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def alone(model, documents):
    return torch.cat([model(ids).logits for ids in documents], 1)


MARKS = {
    "position_ids": lambda: {"position_ids": positions()},
    "seq_idx": lambda: {"seq_idx": numbers().int()},
    "cu_seqlens": lambda: {"cu_seqlens": offsets()},
    "flash": lambda: {
        "cu_seq_lens_q": offsets(),
        "cu_seq_lens_k": offsets(),
        "max_length_q": 12,
        "max_length_k": 12,
    },
    "all": lambda: {
        "position_ids": positions(),
        "cu_seq_lens_q": offsets(),
        "seq_idx": numbers(),
        "max_length_q": 12,
    },
}


@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_separate(kind, marks):
    model = build(kind).double()
    pieces = documents()
    packed = model(torch.cat(pieces, 1), **MARKS[marks](), output_hidden_states=True)
    assert torch.allclose(packed.logits, alone(model, pieces), atol=1e-9)
    assert packed.past_key_values is None
    assert packed.hidden_states[0].shape == (1, sum(LENGTHS), 32)


@pytest.mark.parametrize("kind", PEERS)
def test_positions_that_restart(kind):
    """TRL's packing and the flattening collator call the model so; a Llama gives the pattern."""
    model = build(kind)
    pieces = documents()
    packed = model(torch.cat(pieces, 1), position_ids=positions(), use_cache=False).logits
    assert torch.allclose(packed, alone(model, pieces), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_loss(kind):
    """The loss is the mean over all predictable tokens, however first tokens are labelled."""
    model = build(kind).double()
    pieces = documents()
    ids = torch.cat(pieces, 1)
    losses = [
        model(piece, labels=piece, num_items_in_batch=1).loss
        for piece in pieces
        if piece.shape[1] > 1
    ]
    expected = sum(losses) / sum(n - 1 for n in LENGTHS)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    without = ids.masked_fill(positions() == 0, -100)
    for labels in (ids, without):
        model.zero_grad()
        loss = model(ids, position_ids=positions(), labels=labels).loss
        assert loss.item() == pytest.approx(
            expected.item(), rel=1e-6
        )  # transformers takes it in fp32
    loss.backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, gradients[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["taylor", "based", "gated_based", "flash", "elita", "gau"])
def test_rows_with_padding_in_several(kind, checkpointing):
    """Documents in padded rows give the outputs and gradients of each alone; padding gives 0."""
    model = build(kind).double()
    if checkpointing:
        model.train()
        checkpoint(model)
    rows = [(7, 5), (12,), (2, 3, 4)]
    ids, mask = torch.zeros(3, 14, dtype=torch.long), torch.zeros(3, 14)
    position = torch.full((3, 14), 1)
    for i, (lengths, first) in enumerate(zip(rows, (0, 2, 4))):
        n = sum(lengths)
        ids[i, first : first + n] = torch.cat(documents(lengths), 1)[0]
        position[i, first : first + n] = positions(lengths)[0]
        mask[i, first : first + n] = 1
    out = model(ids, attention_mask=mask, position_ids=position, output_hidden_states=True)
    separate = torch.cat(
        [model(piece).logits[0] for lengths in rows for piece in documents(lengths)]
    )
    assert torch.allclose(out.logits[mask.bool()], separate, atol=1e-9)
    assert not out.hidden_states[1][~mask.bool()].any()
    if checkpointing:
        out.logits[mask.bool()].square().sum().backward()
        packed = model.model.layers[0].mixer.out_proj.weight.grad.clone()
        model.zero_grad()
        separate.square().sum().backward()
        assert torch.allclose(packed, model.model.layers[0].mixer.out_proj.weight.grad, rtol=1e-6)


@pytest.mark.parametrize("kind", PEERS)
def test_ordinary_positions_change_nothing(kind):
    """Trainers and older clients pass positions for all rows or for each, by tokens or by slots."""
    model, ids = build(kind).double(), tokens(2, 9)
    expected = model(ids).logits
    for position_ids in (torch.arange(9)[None], torch.arange(9).expand(2, 9)):
        assert torch.allclose(model(ids, position_ids=position_ids).logits, expected, atol=1e-9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    expected = model(
        ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    ).logits[mask.bool()]
    if kind != "llama":  # which rotates by slots then
        assert torch.allclose(
            model(ids, attention_mask=mask).logits[mask.bool()], expected, atol=1e-9
        )
        by_slot = model(ids, attention_mask=mask, position_ids=torch.arange(9)[None]).logits[
            mask.bool()
        ]
        assert torch.allclose(by_slot, expected, atol=1e-9)
    place = (mask.cumsum(1) - 1).clamp(min=0)
    first = model(ids[:, :5], attention_mask=mask[:, :5], position_ids=place[:, :5], use_cache=True)
    cache = first.past_key_values
    rest = model(
        ids[:, 5:], attention_mask=mask, position_ids=place[:, 5:], past_key_values=cache
    ).logits
    assert torch.allclose(torch.cat((first.logits, rest), 1)[mask.bool()], expected, atol=1e-9)


def test_other_starts():
    """Most models use distances alone; those that count positions from 0 refuse others."""
    ids = tokens(1, 9)
    for kind in KINDS:
        model = build(kind).double()
        later = torch.arange(5, 14)[None]
        if model.config.counts_positions:
            with pytest.raises(
                ValueError,
                match="position_ids: a document begins at 5, but this model counts from 0",
            ):
                model(ids, position_ids=later)
        else:
            assert torch.allclose(
                model(ids, position_ids=later).logits, model(ids).logits, atol=1e-9
            )
            packed = model(ids, position_ids=positions((4, 5), start=2)).logits
            assert torch.allclose(packed, alone(model, ids.split((4, 5), 1)), atol=1e-9)


def test_flattening_collator():
    """transformers' own, with every mark that it can write, and with its labels."""
    pieces = [{"input_ids": piece[0].tolist()} for piece in documents()]
    for kind in PEERS:
        model = build(kind).double()
        for more in (
            {},
            {"return_flash_attn_kwargs": True},
            {"return_flash_attn_kwargs": True, "return_seq_idx": True},
        ):
            if kind == "llama" and more:
                continue
            batch = DataCollatorWithFlattening(return_tensors="pt", **more)(pieces)
            out = model(**batch, use_cache=False)
            assert torch.allclose(out.logits, alone(model, documents()), atol=1e-6), kind
            losses = [
                model(p, labels=p).loss * (p.shape[1] - 1) for p in documents() if p.shape[1] > 1
            ]
            assert out.loss.item() == pytest.approx(
                sum(losses).item() / (sum(LENGTHS) - len(LENGTHS)), abs=1e-6
            )


def test_encoder():
    torch.manual_seed(0)
    model = CumulantForMaskedLM(config("flash", is_causal=False)).double().eval()
    pieces = documents()
    packed = model(torch.cat(pieces, 1), position_ids=positions(), labels=torch.cat(pieces, 1))
    assert torch.allclose(packed.logits, alone(model, pieces), atol=1e-9)


REFUSED = {
    "gap": (
        {"position_ids": [[0, 1, 2, 5, 6, 7]]},
        "position_ids: 2 is followed by 5; positions rise by one",
    ),
    "shape": (
        {"position_ids": [[0, 1, 2]]},
        r"position_ids: expected integers \[B, T\] = \[1, 6\]",
    ),
    "float": (
        {"position_ids": [[0.0, 1, 2, 3, 4, 5]]},
        r"position_ids: expected integers .* got torch.float32",
    ),
    "contradiction": (
        {"position_ids": [[0, 1, 2, 0, 1, 2]], "seq_idx": [[0, 0, 1, 1, 1, 1]]},
        "seq_idx: marks other documents than position_ids, at token 2 of a row",
    ),
    "one document and two": (
        {"position_ids": [[0, 1, 2, 3, 4, 5]], "cu_seqlens": [0, 3, 6]},
        "cu_seqlens: marks other documents than position_ids, at token 3",
    ),
    "two offsets": (
        {"cu_seq_lens_q": [0, 3, 6], "cu_seq_lens_k": [0, 4, 6]},
        "cu_seq_lens_k: differs from cu_seq",
    ),
    "longest": (
        {"cu_seqlens": [0, 2, 6], "max_length_q": 3},
        "max_length_q: 3 is less than the longest document, 4",
    ),
    "mask of numbers": (
        {"attention_mask": [[1, 1, 1, 2, 2, 2]]},
        "attention_mask: expected 1 for tokens and 0",
    ),
    "offsets beyond": ({"cu_seqlens": [0, 3, 9], "seq_idx": [[0, 0, 0, 1, 1, 1]]}, "cu_seqlens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    given, message = REFUSED[case]
    given = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        build("taylor")(tokens(1, 6), **given)


def test_no_cache_under_documents():
    """Offsets together with a cache are refused; an earlier version ignored them."""
    model, ids = build("taylor"), tokens(1, 6)
    cache = model(ids, use_cache=True).past_key_values
    for marks in (
        {"cu_seqlens": torch.tensor([0, 3, 6])},
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]])},
    ):
        with pytest.raises(
            ValueError, match="past_key_values: packed documents have no single state"
        ):
            model(ids, past_key_values=cache, **marks)
    with pytest.raises(
        ValueError, match="position_ids: a document begins at 0, but behind 6 cached positions"
    ):
        model(ids, past_key_values=cache, position_ids=torch.arange(6)[None])
    with pytest.raises(
        ValueError, match="cu_seqlens: packed documents need one row, B = 1, got B = 2"
    ):
        model(tokens(2, 6), cu_seqlens=torch.tensor([0, 3, 6]))
    with pytest.raises(
        ValueError, match="logits_to_keep: packed documents need the labels of all 6 tokens, got 2"
    ):
        model(ids, cu_seqlens=torch.tensor([0, 3, 6]), logits_to_keep=2, labels=ids[:, -2:])


def test_tokenizer_is_the_bytes():
    assert TOKENIZER("ab")["input_ids"] == [97, 98]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["taylor", "flash", "elita"])
def test_compiled(kind):
    """Offsets stay in one graph; restarting positions break it, with the right results."""
    model, ids = build(kind, num_hidden_layers=1), torch.cat(documents(), 1)
    harmless = {
        "token_type_ids": torch.zeros(1, 24, dtype=torch.long),
        "cache_position": torch.arange(24),
        "attention_mask": torch.ones(1, 24),
        "head_mask": torch.ones(2, 4),
    }
    for given, whole in ((harmless, True), (MARKS["flash"](), True), (MARKS["all"](), False)):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=whole)
        with torch.no_grad():
            found = compiled(ids, use_cache=False, **given).logits
            assert torch.allclose(found, model(ids, use_cache=False, **given).logits, atol=1e-4)
    given = {**harmless, "token_type_ids": torch.ones(1, 24, dtype=torch.long)}
    with pytest.raises(RuntimeError, match="token_type_ids: these models have one type of token"):
        compiled(ids, use_cache=False, **given)


def test_exported():
    model, ids = build("taylor", num_hidden_layers=1), tokens(1, 8)
    inputs = {"input_ids": ids, "position_ids": torch.arange(8)[None], "use_cache": False}
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs).module()
        assert torch.allclose(exported(**inputs).logits, model(ids).logits, atol=1e-5)
        with pytest.raises(
            RuntimeError, match="position_ids: the exported model takes rows of one document"
        ):
            exported(**{**inputs, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])})

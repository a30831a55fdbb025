"""Arguments of decoders: harmless values pass, others are honoured or refused by name."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    StoppingCriteriaList,
    StopStringCriteria,
    pipeline,
)

from cumulant.models import (
    CumulantForMaskedLM,
    CumulantForQuestionAnswering,
    CumulantForSequenceClassification,
    CumulantForTokenClassification,
    CumulantModel,
)

from .common import KINDS, PEERS, TOKENIZER, build, config, tokens

MODELS = {
    "causal": lambda: build("taylor"),
    "base": lambda: CumulantModel(config("flash")).eval(),
    "masked": lambda: CumulantForMaskedLM(config("flash", is_causal=False)).eval(),
    "sequence": lambda: CumulantForSequenceClassification(config("based")).eval(),
    "token": lambda: CumulantForTokenClassification(config("elita")).eval(),
    "question": lambda: CumulantForQuestionAnswering(config("linear")).eval(),
}
HARMLESS = {
    "output_attentions": [None, False],
    "output_hidden_states": [None, False, True],
    "output_router_logits": [None, False],
    "return_dict": [None, True],
    "use_cache": [None, False],
    "position_ids": [None, torch.arange(5)[None]],
    "cache_position": [None, torch.arange(5)],
    "token_type_ids": [None, torch.zeros(2, 5, dtype=torch.long)],
    "head_mask": [None, torch.ones(2, 4), [None, None]],
    "num_items_in_batch": [None, 3],
    "inputs_embeds": [None],
    "past_key_values": [None],
    "attention_mask": [None, torch.ones(2, 5), torch.ones(2, 5, dtype=torch.bool)],
    "max_length_q": [None, 5],
}


@pytest.mark.parametrize("name", MODELS)
def test_harmless_values(name):
    model, ids = MODELS[name](), tokens(2, 5)
    expected = model(ids)[0]
    for argument, values in HARMLESS.items():
        for value in values:
            assert torch.equal(model(ids, **{argument: value})[0], expected), (argument, value)
    everything = {argument: values[-1] for argument, values in HARMLESS.items()}
    assert torch.equal(model(ids, **everything)[0], expected)
    assert torch.equal(model(ids, return_dict=False)[0], expected)
    if name in ("sequence", "token", "question"):
        return  # transformers' heads fail there, with any model
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], expected)
    assert isinstance(model(ids), tuple)


REFUSED = {
    "output_attentions": (True, "output_attentions: these models form no attention weights"),
    "output_router_logits": (True, "output_router_logits: these models have no experts"),
    "head_mask": (torch.tensor([1.0, 0, 1, 1]), "head_mask: heads cannot be switched off"),
    "token_type_ids": (
        torch.tensor([[0, 0, 1, 1, 1]]),
        "token_type_ids: these models have one type of token",
    ),
    "cache_position": (
        torch.arange(1, 6),
        r"cache_position: expected \[T\] = 0 to 4, behind the 0 cached",
    ),
}


@pytest.mark.parametrize("argument", REFUSED)
@pytest.mark.parametrize("name", MODELS)
def test_what_cannot_be_honoured(name, argument):
    value, message = REFUSED[argument]
    with pytest.raises(ValueError, match=message):
        MODELS[name]()(tokens(1, 5), **{argument: value})


@pytest.mark.parametrize("name", MODELS)
def test_typos_and_types(name):
    model, ids = MODELS[name](), tokens(1, 5)
    with pytest.raises(
        TypeError,
        match="unexpected keyword argument 'atention_mask'; did you mean 'attention_mask'",
    ):
        model(ids, atention_mask=torch.ones(1, 5))
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'pixels'$"):
        model(ids, pixels=None)
    with pytest.raises(
        ValueError, match=f"is_causal: the configuration says {model.config.is_causal}"
    ):
        model(ids, is_causal=not model.config.is_causal)
    with pytest.raises(
        ValueError, match="`output_attentions` attribute is not supported"
    ):  # by transformers
        model.config.output_attentions = True
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(
        ValueError, match="output_attentions: these models form no attention weights"
    ):
        model(ids)


def test_not_the_base_models_business():
    model, ids = MODELS["base"](), tokens(1, 5)
    for argument in ("labels", "shift_labels", "logits_to_keep"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{argument}'"):
            model(ids, **{argument: ids})
    with pytest.raises(
        TypeError, match="past_key_values: expected a transformers Cache, got tuple"
    ):
        model(ids, past_key_values=((ids, ids),))


@pytest.mark.parametrize("kind", PEERS)
def test_hidden_states_from_the_configuration(kind):
    model, ids = build(kind), tokens(2, 5)
    asked = model(ids, output_hidden_states=True).hidden_states
    assert model(ids).hidden_states is None
    model.config.output_hidden_states = True
    for states in (model(ids).hidden_states, model.model(ids).hidden_states):
        assert (
            len(states)
            == len(asked)
            == 1 + len(model.model.layers) * getattr(model.config, "wraps", 1)
        )
        assert all(torch.equal(a, b) for a, b in zip(states, asked))
    assert model(ids, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("kind", ["llama", "taylor", "elita"])
def test_logits_to_keep(kind):
    model, ids = build(kind), tokens(2, 7)
    whole = model(ids).logits
    mask = torch.tensor([[1, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]]).bool()
    close = lambda a, b: torch.allclose(a, b, atol=1e-5)  # noqa: E731
    assert close(model(ids, logits_to_keep=3).logits, whole[:, -3:])
    assert close(model(ids, logits_to_keep=torch.tensor([1, 5])).logits, whole[:, [1, 5]])
    each = torch.tensor([[0, 2], [6, 1]])
    assert close(
        model(ids, logits_to_keep=each).logits, torch.stack((whole[0, [0, 2]], whole[1, [6, 1]]))
    )
    assert close(model(ids, logits_to_keep=mask).logits, whole[mask])
    kept = model(ids, logits_to_keep=4, labels=ids[:, -4:]).loss
    assert close(kept, model.loss_function(whole[:, -4:].contiguous(), ids[:, -4:], 257))
    if kind != "llama":
        with pytest.raises(
            ValueError, match=r"labels: expected \[2, 4\], one for each of the logits, got \[2, 7\]"
        ):
            model(ids, logits_to_keep=4, labels=ids)


def test_shift_labels_stay():
    model, ids = build("taylor"), tokens(2, 7)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    assert model(ids, shift_labels=shifted).loss.item() == pytest.approx(
        model(ids, labels=ids).loss.item()
    )


@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize("beams", [1, 2])
def test_stop_strings(kind, beams):
    """The text ends where the string first occurs in it."""
    model, ids = build(kind), tokens(1, 4, high=128)
    options = {
        "do_sample": False,
        "num_beams": beams,
        "max_new_tokens": 12,
        "suppress_tokens": [*range(128, 257)],
    }
    free = TOKENIZER.decode(model.generate(ids, **options)[0, 4:])
    assert len(free) == 12
    stop = free[3:5]
    stopped = model.generate(ids, stop_strings=[stop], tokenizer=TOKENIZER, **options)
    if beams == 1:
        assert TOKENIZER.decode(stopped[0, 4:]) == free[: free.index(stop) + 2]
    criteria = StoppingCriteriaList([StopStringCriteria(TOKENIZER, [stop])])
    assert torch.equal(model.generate(ids, stopping_criteria=criteria, **options), stopped)


@pytest.mark.parametrize("kind", ["llama", "taylor"])
def test_pipeline_of_generation(kind):
    pipe = pipeline("text-generation", model=build(kind), tokenizer=TOKENIZER)
    options = {"do_sample": False, "return_full_text": False, "max_new_tokens": 12}
    free = pipe("ab", **options)[0]["generated_text"]
    stop = next(c for c in free[1:] if c.isprintable())
    assert stop in pipe("ab", stop_sequence=stop, **options)[0]["generated_text"]
    both = pipe(["ab", "abcdef"], batch_size=2, **options)
    assert both[0][0]["generated_text"] == free


@pytest.mark.parametrize("kind", KINDS)
def test_positions_in_generation(kind):
    """Positions given to `generate` are checked at every step; its own are not passed on."""
    model, ids = build(kind), tokens(2, 6)
    options = {"do_sample": False, "max_new_tokens": 6}
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    expected = model.generate(ids, attention_mask=mask, **options)
    place = (mask.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, position_ids=place, **options), expected
    )
    zeros = torch.zeros(2, 6, dtype=torch.long)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, token_type_ids=zeros, **options), expected
    )
    with pytest.raises(ValueError, match="position_ids"):
        model.generate(ids, attention_mask=mask, position_ids=place * 2, **options)
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(ids, atention_mask=mask, **options)


@pytest.mark.parametrize("kind", ["llama", "taylor", "flash"])
def test_positions_behind_a_cache(kind):
    model, ids = build(kind), tokens(1, 8)
    expected = model(ids).logits[:, 5:]
    for given in (
        {"position_ids": torch.arange(5, 8)[None]},
        {"cache_position": torch.arange(5, 8)},
        {},
    ):
        cache = DynamicCache(config=model.config)
        model(ids[:, :5], past_key_values=cache)
        assert torch.allclose(
            model(ids[:, 5:], past_key_values=cache, **given).logits, expected, atol=1e-3, rtol=1e-3
        )


@pytest.mark.parametrize("kind", PEERS)
def test_generation_from_embeddings(kind):
    model, ids = build(kind), tokens(2, 5)
    options = {"do_sample": False, "max_new_tokens": 5}
    embeddings = model.get_input_embeddings()(ids)
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **options), expected[:, 5:])
    assert torch.equal(model.generate(ids, inputs_embeds=embeddings, **options), expected)


@pytest.mark.parametrize("name", MODELS)
def test_ids_of_the_wrong_kind(name):
    model, ids = MODELS[name](), tokens(1, 5)
    for bad, error, message in (
        (
            ids[0],
            ValueError,
            (
                r"input_ids: expected \[B, T\], got \[5\]; one text is a batch of one,"
                r" input_ids\[None\]"
            ),
        ),
        (ids[None], ValueError, r"input_ids: expected \[B, T\], got \[1, 1, 5\]"),
        (
            ids.float(),
            TypeError,
            r"input_ids: expected int64 or int32, got torch.float32; try input_ids.long\(\)",
        ),
        (ids + 300, ValueError, "input_ids: expected ids from 0 to vocab_size - 1 = 256, got"),
        (-ids - 1, ValueError, "input_ids: expected ids from 0"),
    ):
        with pytest.raises(error, match=message):
            model(bad)
    assert torch.equal(model(ids.int())[0], model(ids)[0])
    with pytest.raises(
        ValueError, match=r"inputs_embeds: expected \[B, T, D\] with D=32, got \[1, 5, 31\]"
    ):
        model(inputs_embeds=torch.zeros(1, 5, 31))
    with pytest.raises(ValueError, match="input_ids: pass either"):
        model(ids, inputs_embeds=torch.zeros(1, 5, 32))


@pytest.mark.parametrize("kind", PEERS)
def test_attention_implementations(kind, tmp_path):
    """Clients ask for "sdpa" or "eager" by name, and the models run the same code for both."""
    model, ids = build(kind), tokens(1, 5)
    model.save_pretrained(tmp_path)
    for name in ("sdpa", "eager"):
        found = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        assert torch.allclose(found(ids).logits, model(ids).logits, atol=1e-4)
    with pytest.raises((ImportError, ValueError), match=r"Flash ?Attention ?2"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_attention_2")

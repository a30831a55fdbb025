"""Assisted generation: drafts by another model, early layers or the prompt are verified."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, set_seed

from cumulant.models import PRESETS

from ..models.common import WRAPPED, build, tokens

HYBRID = {"mixers": ["softmax", "linear", "sliding_window", "gau"], "num_hidden_layers": 4}
NAMES = [*PRESETS, "hybrid", pytest.param("wrapped", marks=pytest.mark.slow), "llama"]


def llama():
    """A Llama, which the same calls are compared with."""
    set_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3}
    return (
        LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=0))
        .double()
        .eval()
    )


def model_of(name):
    if name == "llama":
        model = llama()
    elif name in ("hybrid", "wrapped"):
        model = build("taylor", **(HYBRID if name == "hybrid" else WRAPPED))
    else:
        model = build(name)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = None  # or a drafted 0 would be taken for padding
    model.generation_config.num_assistant_tokens = 5
    model.generation_config.assistant_confidence_threshold = 0.0  # drafts as long as asked for
    return model


@pytest.fixture(params=NAMES)
def model(request):
    return model_of(request.param)


def prompt():
    return tokens(1, 15).repeat(1, 2)  # longer than windows and groups, and worth looking up


def forwards(model):
    """The lengths of the model's inputs, call by call."""
    lengths = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append((*args, kwargs.get("input_ids"))[0].shape[1]),
        with_kwargs=True,
    )
    return lengths


GREEDY = {"max_new_tokens": 18, "do_sample": False}


def test_greedy_is_greedy_whatever_drafts(model):
    expected = model.generate(prompt(), **GREEDY)
    for drafts in (
        {"assistant_model": model_of("based")},
        {"assistant_model": llama()},
        {"assistant_early_exit": 1},
        {"prompt_lookup_num_tokens": 6, "max_matching_ngram_size": 1},
        {"prompt_lookup_num_tokens": 3},
    ):
        assert torch.equal(model.generate(prompt(), **GREEDY, **drafts), expected), drafts


def test_a_model_accepts_its_own_drafts(model):
    """After states were taken back, its drafts are what it would have generated."""
    drafter = copy.deepcopy(model)
    drafter.generation_config.num_assistant_tokens_schedule = "constant"
    read = forwards(model)
    assert torch.equal(
        model.generate(prompt(), **GREEDY, assistant_model=drafter),
        drafter.generate(prompt(), **GREEDY),
    )
    assert read == [
        35,
        6,
        6,
    ]  # 30 tokens of prompt, then 5 drafted ones and the last token before them


def test_rejected_drafts_leave_no_trace(model):
    """With sampling, every step's logits and the cache's next are those of the whole sequence."""
    read = forwards(model)
    options = {
        "max_new_tokens": 30,
        "do_sample": True,
        "prompt_lookup_num_tokens": 4,
        "max_matching_ngram_size": 1,
    }
    out = model.generate(prompt(), **options, output_logits=True, return_dict_in_generate=True)
    assert max(read[1:]) > 1, "nothing was drafted"
    with torch.no_grad():
        whole = model(out.sequences).logits[:, 29:]
        assert torch.allclose(torch.stack(out.logits, 1), whole[:, :30].float(), atol=1e-5)
        seen = out.past_key_values.get_seq_length()
        rest = model(out.sequences[:, seen:], past_key_values=out.past_key_values).logits
        assert torch.allclose(rest[:, -1], whole[:, -1], atol=1e-8)


@pytest.mark.parametrize("cuts", [[30], [25, 5], [20, *[1] * 10], [3, 20, 7]], ids=str)
@pytest.mark.parametrize("name", [*PRESETS, "hybrid"])
@torch.no_grad()
def test_taking_tokens_back(name, cuts):
    model, ids = model_of(name), prompt()
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    for piece in ids.split(cuts, 1):
        model(piece, past_key_values=cache)
    left = 30
    for count in (0, 1, 4, 0, 7):  # one after another, across the pieces
        left -= count
        cache.crop(-count)
        assert cache.get_seq_length() == left
        copied = copy.deepcopy(cache)  # shares the model
        more = model(ids[:, :4], past_key_values=copied).logits
        expected = model(torch.cat((ids[:, :left], ids[:, :4]), 1)).logits[:, left:]
        assert torch.allclose(more, expected, atol=1e-8)
    copied.crop(-4)
    assert torch.allclose(model(ids[:, :4], past_key_values=copied).logits, expected, atol=1e-8)


@torch.no_grad()
def test_taking_back_padded_and_reordered_rows():
    for name in ("based", "flash"):
        model, ids = model_of(name), tokens(3, 20)
        mask = torch.ones(3, 20, dtype=torch.long)
        mask[1, :6] = mask[2, :11] = 0
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        model(ids[:, :12], attention_mask=mask[:, :12], past_key_values=cache)
        model(ids[:, 12:], attention_mask=mask, past_key_values=cache)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        ids, mask = ids[[2, 0, 0]], mask[[2, 0, 0]]
        cache.crop(-9)
        left = mask[:, :11]
        more = torch.cat((left, torch.ones(3, 5, dtype=torch.long)), 1)
        found = model(ids[:, :5], attention_mask=more, past_key_values=cache).logits
        whole = model(torch.cat((ids[:, :11], ids[:, :5]), 1), attention_mask=more).logits[:, 11:]
        assert torch.allclose(found, whole, atol=1e-8)


def test_long_recordings_are_let_go():
    """Once `crop` has been called, memory for going back is bounded, even if nothing is cropped."""
    model = model_of("taylor")
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(tokens(1, 400), past_key_values=cache)
        before = cache.layers[0].state
        cache.crop(0)
        assert cache.layers[0].state is before
        assert sum(x.shape[1] for x, _ in cache.layers[0].inputs) <= 64
        cache.crop(-20)
        assert torch.allclose(
            model(tokens(1, 400)[:, 380:], past_key_values=cache).logits,
            model(tokens(1, 400)).logits[:, 380:],
        )


def test_states_that_were_not_recorded():
    model = model_of("linear")
    cache = model(prompt(), use_cache=True).past_key_values
    with pytest.raises(
        RuntimeError, match="crop: cannot take 2 tokens back .* activate_past_recording"
    ):
        cache.crop(-2)
    with pytest.raises(
        ValueError, match="tokens_to_remove: expected 0 or the negative of a number, got 5"
    ):
        cache.crop(5)
    cache.crop(0)
    mixed = model_of("hybrid")
    cache = mixed(prompt(), use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="crop: cannot take"):
        cache.crop(-2)  # keys and values were cut before
    with pytest.raises(ValueError, match=r"different numbers of tokens, 28 to 30"):
        mixed(prompt()[:, :1], past_key_values=cache)


def test_what_transformers_refuses():
    model = model_of("taylor")
    with pytest.raises(ValueError, match="batch_size = 1"):
        model.generate(prompt().repeat(2, 1), **GREEDY, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="Static cache"):
        model.generate(
            prompt(), **GREEDY, prompt_lookup_num_tokens=3, cache_implementation="static"
        )

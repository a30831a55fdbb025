"""`generate()` gives the same with a cache and without, by every method of decoding."""

import pytest
import torch
from transformers import DynamicCache, TextStreamer

from cumulant.models import PRESETS

from .common import WRAPPED, build, tokens


@pytest.fixture(params=[*PRESETS, "gau", "wrapped"])
def model(request):
    if request.param == "wrapped":
        return build("taylor", **WRAPPED).float()
    if request.param == "gau":
        return build("flash", mixers=["gau", "flash"]).float()
    return build(request.param).float()


def padded(lengths=(12, 5)):
    ids = tokens(len(lengths), max(lengths))
    out, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        out[i, -n:], mask[i, -n:] = ids[i, :n], 1
    return ids, out, mask


def test_greedy_is_the_argmax_of_the_whole_sequence(model):
    ids = tokens(1, 6)
    out = model.generate(ids, max_new_tokens=12, do_sample=False)
    for t in range(6, 18):
        assert out[0, t] == model(out[:, :t]).logits[0, -1].argmax()


def test_batches_of_unequal_prompts(model):
    """Left padding gives the same tokens as each prompt alone."""
    ids, prompts, mask = padded()
    together = model.generate(prompts, attention_mask=mask, max_new_tokens=15, do_sample=False)[
        :, 12:
    ]
    for i, n in enumerate((12, 5)):
        alone = model.generate(ids[i : i + 1, :n], max_new_tokens=15, do_sample=False)[0, n:]
        assert torch.equal(together[i], alone)


@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}],
    ids=str,
)
def test_with_and_without_a_cache(model, options):
    _, prompts, mask = padded()
    options = {"do_sample": False, "max_new_tokens": 12, "attention_mask": mask} | options
    assert torch.equal(
        model.generate(prompts, **options), model.generate(prompts, use_cache=False, **options)
    )


def test_sampling_repeats_with_its_seed(model):
    ids = tokens(2, 6)
    runs = []
    for use_cache in (True, True, False):
        torch.manual_seed(3)
        runs.append(
            model.generate(
                ids,
                do_sample=True,
                top_k=10,
                temperature=0.9,
                max_new_tokens=10,
                use_cache=use_cache,
            )
        )
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_all_rows_may_finish(model):
    """An end-of-text token that comes at once in one row, and in the end in all."""
    ids = tokens(2, 6)
    first = model.generate(ids, max_new_tokens=8, do_sample=False)[:, 6:]
    out = model.generate(
        ids, max_new_tokens=8, do_sample=False, eos_token_id=int(first[0, 0]), pad_token_id=0
    )
    assert not out[0, 7:].any()


def test_onto_a_cache_in_pieces(model):
    ids = tokens(1, 14)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    cache = DynamicCache(config=model.config)
    model(ids[:, :9], past_key_values=cache)
    assert torch.equal(
        model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False), expected
    )
    assert torch.equal(
        model.generate(ids, max_new_tokens=6, do_sample=False, prefill_chunk_size=5), expected
    )


def test_streamers(model, capsys):
    class Letters:
        def decode(self, ids, **_):
            return "".join(chr(65 + int(i)) for i in ids)

    ids = tokens(1, 4)
    out = model.generate(
        ids, max_new_tokens=7, do_sample=False, streamer=TextStreamer(Letters(), skip_prompt=True)
    )
    assert capsys.readouterr().out.strip() == Letters().decode(out[0, 4:])

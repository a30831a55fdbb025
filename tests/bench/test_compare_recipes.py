"""The recipes of `cumulant compare` are fair, and some are published settings."""

import itertools
from typing import get_type_hints

import pytest
import torch

from cumulant.bench.compare.recipes import RECIPES, find_recipe
from cumulant.bench.compare.sizes import configuration, differences
from cumulant.models import CumulantForCausalLM

from .comparisons import TINY

CASES = [(name, m) for name in RECIPES for m in RECIPES[name].mechanisms]


@pytest.mark.parametrize(("name", "mechanism"), CASES, ids=lambda x: getattr(x, "name", x))
def test_every_recipe_is_fair(name, mechanism):
    """Parameters agree within 2%, with at least three rates and seeds, and a baseline.

    Two seeds, where a seed takes ten times as long as a rate.
    """
    recipe = find_recipe(name)
    with torch.device("meta"):
        model = CumulantForCausalLM(configuration(recipe, mechanism, recipe.vocabulary or 257))
    assert abs(model.num_parameters() / recipe.parameters - 1) < 0.02
    assert len(recipe.learning_rates) >= 3
    assert recipe.seeds >= (3 if recipe.sweep == 1 else 2)
    assert recipe.baseline in [m.name for m in recipe.mechanisms]
    assert recipe.quick().baseline in [m.name for m in recipe.quick().mechanisms]


@pytest.mark.parametrize("mechanism", RECIPES["elita-wikitext"].mechanisms, ids=lambda m: m.name)
def test_elita_wikitext_is_its_author_s_setting(mechanism):
    """It has fewer than 300K parameters, 128 sequences of 256 a step, and ELiTA's optimizer."""
    recipe = RECIPES["elita-wikitext"]
    config = configuration(recipe, mechanism, 2048)
    assert recipe.parameters * 1.02 < 300_000
    assert (recipe.context, recipe.batch, recipe.epochs, recipe.steps) == (256, 128, 1, 0)
    assert recipe.training == {
        "schedule": "capped_inverse_sqrt",
        "adam_beta2": 0.99,
        "weight_decay": 0.0,
    }
    assert 1e-3 in recipe.learning_rates
    if mechanism.name == "softmax":
        assert config.rotary
        assert config.feed_forward == "swiglu"
    elif mechanism.preset == "elita":
        assert config.wraps == (3 if "wraps" in mechanism.name else 1)
        assert config.query_logit == ("without Q" not in mechanism.name)
    assert config.tie_word_embeddings


def test_flash_enwik8_is_flash_pytorch_s_setting():
    """`cumulant train --recipe flash-enwik8` has FLASH's own layers, and its rate in the sweep."""
    from cumulant.text.recipes import from_recipe

    recipe, published = RECIPES["flash-enwik8"], from_recipe("flash-enwik8")
    (flash,) = (m for m in recipe.mechanisms if m.name == "flash")
    config = configuration(recipe, flash, 257)
    theirs = published.overrides()
    assert {name: getattr(config, name) for name in theirs} == theirs
    assert published.learning_rate in recipe.learning_rates
    assert config.num_hidden_layers == published.depth
    same = ("data", "width", "context", "batch", "accumulate", "steps")
    assert [getattr(recipe, name) for name in same] == [getattr(published, name) for name in same]
    assert recipe.training == {name: getattr(published, name) for name in recipe.training}


@pytest.mark.parametrize(("name", "context"), [("20m-tokens", 1024), ("20m-tokens-2048", 2048)])
def test_twenty_million_tokens(name, context):
    """Rates are swept on a tenth of them, and models are read up to 64 times their length."""
    recipe = RECIPES[name]
    assert 20_000_000 <= recipe.steps * recipe.step_tokens < 20_010_000
    assert 1_000_000 <= recipe.parameters <= 3_000_000
    assert (recipe.context, recipe.sweep, recipe.seeds, recipe.reach) == (context, 0.1, 2, 64)
    names = {m.name for m in recipe.mechanisms}
    assert names >= {"softmax", "linear", "taylor", "based", "window-64"}
    for mechanism in recipe.mechanisms:  # gated ones differ from the others in nothing else
        if mechanism.name.startswith("gated_"):
            name = mechanism.name[6:].partition(",")[0]
            plain = next(m for m in recipe.mechanisms if m.name == name)
            found = differences(*(configuration(recipe, m, 2048) for m in (mechanism, plain)))
            assert found.pop("decay") in ("gated", "mamba2")
            assert found.keys() <= {"decay_spans"}
    starts = {name for name in names if name.startswith("gated_taylor, ")}
    assert {"gated_linear", "gated_based"} <= names
    assert len(starts) == 4
    trained = [configuration(recipe, m, 2048).to_dict() for m in recipe.mechanisms]
    for config in trained:
        del config["preset"]
    assert all(a != b for a, b in itertools.combinations(trained, 2))  # nothing is trained twice


def test_a_trial_run_is_short():
    quick = RECIPES["gates"].quick()
    assert (quick.steps, quick.passing_steps, quick.reach) == (40, 40, 4)


def test_wraps_add_no_layers():
    wrapped = configuration(TINY, TINY.mechanisms[2], 300)
    assert wrapped.wraps == 2
    once = configuration(TINY, TINY.mechanisms[1], 300)
    models = [CumulantForCausalLM(c) for c in (once, wrapped)]
    assert [len(m.model.layers) for m in models] == [2, 2]
    assert models[1].num_parameters() - models[0].num_parameters() == 2 * 32


def test_only_the_mechanisms_named_and_the_baseline():
    names = [m.name for m in TINY.chosen(["elita, 2 wraps"]).mechanisms]
    assert names == ["softmax", "elita, 2 wraps"]


def test_the_command_line_names_every_recipe():
    from cumulant import cli

    (option,) = get_type_hints(cli.compare, include_extras=True)["recipe"].__metadata__
    assert option.help.rpartition(": ")[2] == ", ".join(RECIPES)

"""`cumulant compare`: one budget for all, figures that are the runs', and nothing lost when it is interrupted."""

import json
import math
import shutil
import statistics
from dataclasses import replace
from typing import get_type_hints

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from cumulant.bench import compare as bench
from cumulant.bench.recipes import RECIPES, Mechanism, configuration
from cumulant.models import CumulantForCausalLM
from cumulant.text.checkpoint import load_checkpoint
from cumulant.text.tokens import read_tokens

pytestmark = pytest.mark.filterwarnings("ignore")
TINY = replace(
    RECIPES["elita-wikitext"],
    mechanisms=(
        Mechanism("softmax", "softmax"),
        Mechanism("elita", "elita"),
        Mechanism("elita, 2 wraps", "elita", {"wraps": 2}),
    ),
    vocabulary=300,
    width=32,
    depth=2,
    heads=2,
    parameters=40_000,
    context=32,
    batch=4,
    epochs=1.0,
    seeds=2,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["cat", "dog", "bat", "rat", "owl"]
    path.write_text("".join(f"{i} of the {words[i * i % 5]}s sat on the {words[i % 4]};\n" for i in range(900)))
    return path


def run(text, output, **options):
    lines = []

    class Note(Console):
        def print(self, *parts, **_):
            lines.extend(str(p) for p in parts)

    options = {"mechanisms": [], "seeds": None, "epochs": None, "heldout": 0.1, "device": "cpu"} | options
    bench.compare("tiny", str(text), str(output), console=Note(), **options)
    return lines


@pytest.fixture(scope="module")
def done(text, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "tiny", TINY)
        output = tmp_path_factory.mktemp("compare") / "out"
        run(text, output)
        yield output


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny", TINY)


@pytest.mark.parametrize("mechanism", RECIPES["elita-wikitext"].mechanisms, ids=lambda m: m.name)
def test_the_recipe_is_the_authors_setting(mechanism):
    """Fewer than 300K parameters, equal within 2%, sequences of 256, 128 a step, and that optimizer."""
    recipe = RECIPES["elita-wikitext"]
    config = configuration(recipe, mechanism, 2048)
    assert abs(CumulantForCausalLM(config).num_parameters() / recipe.parameters - 1) < 0.02
    assert recipe.parameters * 1.02 < 300_000
    assert (recipe.context, recipe.batch, recipe.epochs) == (256, 128, 1)
    assert (recipe.learning_rate, recipe.schedule, recipe.adam_beta2) == (1e-3, "capped_inverse_sqrt", 0.99)
    if mechanism.name == "softmax":
        assert config.rotary
        assert config.feed_forward == "swiglu"
    else:
        assert config.wraps == (3 if "wraps" in mechanism.name else 1)
        assert config.query_logit == ("without Q" not in mechanism.name)
    assert config.tie_word_embeddings


def test_wraps_add_no_layers():
    wrapped = configuration(TINY, TINY.mechanisms[2], 300)
    assert wrapped.wraps == 2
    once = configuration(TINY, TINY.mechanisms[1], 300)
    models = [CumulantForCausalLM(c) for c in (once, wrapped)]
    assert [len(m.model.layers) for m in models] == [2, 2]
    assert models[1].num_parameters() - models[0].num_parameters() == 2 * 32


def test_figures_are_the_runs(done, text):
    """The table's losses are those of the models left behind, on the held-out text."""
    record = json.loads((done / "compare.json").read_text())
    assert [(r["mechanism"], r["seed"]) for r in record["runs"]] == [
        (m.name, seed) for seed in (0, 1) for m in TINY.mechanisms
    ]
    assert len({r["parameters"] for r in record["runs"]}) <= 3
    assert all(abs(r["parameters"] / 40_000 - 1) < 0.02 for r in record["runs"])
    for r in record["runs"]:
        folder = done / f"{r['mechanism'].replace(', ', '-').replace(' ', '-')}-{r['seed']}"
        model, _ = load_checkpoint(str(folder / f"checkpoint-{record['steps']}"), "cpu")
        heldout = torch.from_numpy(read_tokens(folder / "tokens")[1].ids.astype("int64"))
        nats, count = 0.0, 0
        for start in range(0, len(heldout) - 1, 32):
            piece = heldout[start : start + 33]
            with torch.no_grad():
                logits = model(piece[None, :-1], use_cache=False).logits[0]
            nats, count = nats + float(F.cross_entropy(logits, piece[1:], reduction="sum")), count + len(piece) - 1
        assert math.isclose(bench.final(r), nats / count, rel_tol=1e-4)
        assert r["heldout_losses"][-1][0] == record["steps"]
        assert bench.final(r) < math.log(300)  # it learned something
    losses = [bench.final(r) for r in record["runs"] if r["mechanism"] == "elita"]
    base = [bench.final(r) for r in record["runs"] if r["mechanism"] == "softmax"]
    differences = [a - b for a, b in zip(losses, base)]
    row = next(line for line in (done / "table.md").read_text().splitlines() if line.startswith("| elita |"))
    assert f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}" in row
    assert f"{statistics.mean(differences):+.3f} ± {statistics.stdev(differences):.3f}" in row
    assert {p.name for p in done.iterdir()} >= {"curves.png", "curves.svg", "tokenizer.json", "text.json"}


def test_an_epoch_is_the_text_s_windows_and_mechanisms_differ_in_nothing_else(done):
    record = json.loads((done / "compare.json").read_text())
    tokens = json.loads((done / "text.json").read_text())["tokens"]
    assert record["steps"] == (tokens - 1) // 32 // 4
    options = [json.loads((done / f"{name}-0" / "options.json").read_text()) for name in ("softmax", "elita")]
    differing = {key for key in options[0] if options[0][key] != options[1][key]}
    assert differing <= {"output", "preset", "model_option", "intermediate"}


def test_state_and_kept_bytes(done):
    costs = json.loads((done / "compare.json").read_text())["costs"]
    layers, heads, numbers = 2, 2, 16
    assert costs["elita"]["state_bytes"] == layers * (heads * (numbers + 1) * 8 + 8)
    assert costs["elita, 2 wraps"]["state_bytes"] == 2 * costs["elita"]["state_bytes"]
    assert costs["softmax"]["state_bytes"] == layers * (2 * 32 * 32 * 4 + 8)
    assert 1.5 < costs["elita, 2 wraps"]["kept_bytes"] / costs["elita"]["kept_bytes"] < 2


def test_the_same_command_again_trains_nothing(done, text, monkeypatch):
    before = json.loads((done / "compare.json").read_text())["runs"]

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(bench, "train", refuse)
    run(text, done)
    assert json.loads((done / "compare.json").read_text())["runs"] == before


def test_an_interrupted_comparison_goes_on(done, text, tmp_path, monkeypatch):
    """In another folder, the last run lost: only that one is trained, to the same losses."""
    output = tmp_path / "out"
    shutil.copytree(done, output)
    shutil.rmtree(output / "elita-1")
    (output / "compare.json").unlink()
    trained = []
    real = bench.train
    monkeypatch.setattr(bench, "train", lambda options, **rest: trained.append(options.output) or real(options, **rest))
    run(text, output)
    assert trained == [str(output / "elita-1")]
    pick = lambda folder: [bench.final(r) for r in json.loads((folder / "compare.json").read_text())["runs"]]  # noqa: E731
    assert pick(output) == pytest.approx(pick(done), abs=1e-5)


def test_mistakes(done, text, tmp_path):
    def refuses(message, output=tmp_path / "new", **options):
        with pytest.raises(ValueError, match=message):
            run(text, output, **options)

    refuses("mechanism: expected one of softmax, elita, elita, 2 wraps, got 'mamba'", mechanisms=["mamba"])
    refuses("seeds: expected at least 1 seed and epochs above 0, got -1", seeds=-1)
    refuses("seeds: expected at least 1 seed and epochs above 0, got 0", seeds=0)
    refuses("seeds: expected at least 1 seed and epochs above 0, .* and 0", epochs=0.0)
    refuses("seeds: expected at least 1 seed and epochs above 0, .* and -2", epochs=-2)
    refuses(r"data: .* tokens are not one step of 4 x 32; pass more text", epochs=0.001)
    assert not (tmp_path / "new").exists()
    refuses("output: .* holds a comparison on another text", output=done, heldout=0.2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    refuses("output: .*full holds something else; name another folder", output=tmp_path / "full")
    refuses("output: .*softmax-0 was run with another steps; name another folder", output=done, epochs=2)
    rest = dict.fromkeys(("mechanisms", "seeds", "epochs", "heldout", "device", "console"))
    with pytest.raises(ValueError, match="recipe: expected one of elita-wikitext, tiny, got 'gpt'"):
        bench.compare("gpt", str(text), str(done), **rest)
    with pytest.raises(ValueError, match=r"elita: has .* parameters at the nearest width .* not 1,000 within 2%"):
        configuration(replace(TINY, parameters=1000), TINY.mechanisms[1], 300)


def test_a_start_that_was_cut_short_is_begun_again(text, tmp_path):
    """The tokenizer was written, the note on the text was not."""
    lines = []
    steps = bench._prepare(TINY, tmp_path / "out", str(text), 0.1, lines.append)
    (tmp_path / "out" / "text.json").unlink()
    assert bench._prepare(TINY, tmp_path / "out", str(text), 0.1, lines.append) == steps
    assert lines[0] == lines[1]


def test_only_the_mechanisms_named_and_the_baseline():
    names = [m.name for m in TINY.chosen(["elita, 2 wraps"]).mechanisms]
    assert names == ["softmax", "elita, 2 wraps"]


def test_the_command_line_names_every_recipe():
    from cumulant import cli

    (option,) = get_type_hints(cli.compare, include_extras=True)["recipe"].__metadata__
    assert all(name in option.help for name in RECIPES if name != "tiny")

"""Windows that start from the state of other windows: gradients, resuming, processes, errors."""

import json
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from cumulant.models import CumulantForCausalLM, export_state, from_preset, import_state
from cumulant.text.carry import CarriedStates
from cumulant.text.checkpoint import load_checkpoint
from cumulant.text.evaluate import evaluate_windowed
from cumulant.text.options import TrainingOptions
from cumulant.text.tokenizer import byte_tokenizer
from cumulant.text.tokens import read_tokens, tokenize
from cumulant.text.train import train
from cumulant.text.walks import CarriedWindows, DocumentWalks, plan_walks

from .conftest import SMALL, losses_in

pytestmark = pytest.mark.filterwarnings("ignore")
PRESETS = [
    "linear",
    "taylor",
    "higher_order",
    "based",
    "flash",
    "elita",
    "gated_linear",
    "gated_taylor",
    "gated_based",
]
T = 24


def small_model(preset):
    torch.manual_seed(0)
    config = from_preset(
        preset,
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        horizon=3 * T,
    )
    return CumulantForCausalLM(config).double().train()


def loss_of(model, window, past):
    """The mean cross entropy in fp64; the model's own is in fp32."""
    logits = model(window[:, :-1], **past).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_are_those_with_the_state_held_constant(preset):
    """Of three windows in a row; row 1 starts anew in the second, row 0 in none."""
    model = small_model(preset)
    ids = torch.randint(0, 50, (2, 3 * T + 1))
    carried = CarriedStates(model, batch=2, accumulate=1, context=T)
    pasts = [[], []]
    for w in range(3):
        window = ids[:, w * T : (w + 1) * T + 1]
        fresh = torch.tensor([False, w == 1])
        past = carried.arguments(fresh)
        mean = loss_of(model, window, past)
        found = gradients(model, mean)
        carried.keep(past["past_key_values"])
        losses = []
        for row in range(2):
            if bool(fresh[row]):
                pasts[row] = []
            cache = DynamicCache(config=model.config)
            if pasts[row]:
                with torch.no_grad():
                    model(torch.cat(pasts[row], 1), past_key_values=cache, use_cache=True)
                cache = import_state(DynamicCache(config=model.config), export_state(cache))
            one = window[row : row + 1]
            losses.append(loss_of(model, one, {"past_key_values": cache, "use_cache": True}))
            pasts[row].append(one[:, :-1])
        loss = sum(losses) / 2
        assert mean.item() == pytest.approx(loss.item(), rel=1e-9)
        expected = gradients(model, loss)
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.allclose(found[name], expected[name], rtol=1e-7, atol=1e-9), name


def test_carried_states_have_no_history():
    model = small_model("based")
    carried = CarriedStates(model, batch=2, accumulate=1, context=T)
    past = carried.arguments(torch.tensor([False, False]))
    model(torch.randint(0, 50, (2, T)), **past)
    carried.keep(past["past_key_values"])
    tensors = carried.states[0].tensors()
    assert not any(x.requires_grad for x in tensors.values())
    assert carried.states[0].position.tolist() == [T, T]
    with pytest.raises(ValueError, match="carry_state: expected batches of 2 windows, got 1"):
        carried.arguments(torch.tensor([False]))


def test_files_of_states_serve_any_spread_of_the_rows(tmp_path):
    """Rows keep their states where another number of batches or processes goes on."""
    model = small_model("linear")
    one = CarriedStates(model, batch=4, accumulate=1, context=T)
    past = one.arguments(torch.zeros(4, dtype=torch.bool))
    model(torch.randint(0, 50, (4, T)), **past)
    one.keep(past["past_key_values"])
    one.save(tmp_path)
    found = {}
    for process in (0, 1):
        part = CarriedStates(model, batch=1, accumulate=2, context=T, process=process, processes=2)
        part.load(tmp_path)
        found |= dict(zip(part.firsts, part.states, strict=True))
    for row in range(4):
        expected = one.states[0].select(torch.tensor([row])).tensors()
        for name, x in found[row].tensors().items():
            assert torch.equal(x, expected[name])
    more = CarriedStates(model, batch=5, accumulate=1, context=T)
    with pytest.raises(ValueError, match="holds the states of 4 rows, not of 5"):
        more.load(tmp_path)


def test_walks_read_documents_from_their_start():
    documents = [b"a" * 100, b"b" * 7, b"c" * 9, b"d" * 50]
    tokens = tokenize(documents, byte_tokenizer())
    plan = plan_walks(tokens, 16)
    assert tokens.starts.tolist() == [0, 101, 109, 119]
    first = [(place, place == 0) for place in range(0, 97, 16)]  # the last one ends in "ccc"
    assert plan == [*first, (109, True), (119, True), (135, False), (151, False)]


def test_rows_walk_on_from_turn_to_turn():
    tokens = tokenize([b"x" * 1000, b"y" * 500], byte_tokenizer())
    walks = DocumentWalks(tokens, 10, 60, seed=1, rows=3)
    for row in range(3):
        for turn in range(1, 20):
            before, now = (walks[t * 3 + row] for t in (turn - 1, turn))
            if not now["fresh"]:
                assert before["labels"][-1] == now["input_ids"][0]
    limited = CarriedWindows(walks, 3, 4)
    for row in range(3):
        anew = [bool(limited[t * 3 + row]["fresh"]) for t in range(20)]
        assert all(any(anew[t : t + 4]) for t in range(16))


@pytest.mark.parametrize("mode", ["passing", "document"])
@pytest.mark.parametrize("preset", ["based", "gated_linear"])
def test_a_run_that_goes_on_equals_one_that_did_not_stop(text, tmp_path, mode, preset):
    options = {**SMALL, "steps": 12, "save_every": 4, "carry_state": mode, "preset": preset}
    options |= {"accumulate": 2, "carry_windows": 5, "dropout": 0.1}
    whole = train(
        TrainingOptions(str(tmp_path / "a"), data=str(text), **options), say=lambda _: None
    )
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for step in (8, 12):
        shutil.rmtree(tmp_path / "b" / f"checkpoint-{step}")
    for path in (tmp_path / "b").glob("model*"):
        path.unlink()
    assert (tmp_path / "b" / "checkpoint-4" / "carried" / "00000004.safetensors").is_file()
    again = train(TrainingOptions(str(tmp_path / "b"), resume=True), say=lambda _: None)
    assert again.losses == whole.losses
    first, second = (load_checkpoint(str(tmp_path / n))[0].state_dict() for n in "ab")
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_states_change_the_losses(text, tmp_path):
    """From the second step on; the first has no past."""
    losses = {}
    for mode in ("none", "passing"):
        options = {**SMALL, "steps": 3, "carry_state": mode}
        train(TrainingOptions(str(tmp_path / mode), data=str(text), **options), say=lambda _: None)
        losses[mode] = losses_in(tmp_path / mode)
    assert losses["none"][0] == losses["passing"][0]
    assert losses["none"][2] != losses["passing"][2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"carry_state": "always"}, "carry_state: expected one of none, passing, document, got"),
        ({"carry_state": "passing", "packed": True}, "pass either --carry-state or --packed"),
        ({"carry_state": "passing", "gradient_checkpointing": True}, "recomputed layers keep no"),
        ({"carry_state": "passing", "fsdp": True}, "sharded models carry no states"),
        ({"carry_state": "document", "disjoint": True}, "leave --disjoint out"),
        ({"carry_windows": -1}, "carry_windows: expected 0 or more, got -1"),
    ],
)
def test_options_that_contradict(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**wrong)


def test_a_cache_that_grows_is_refused_before_anything_is_written(text, tmp_path):
    options = TrainingOptions(
        str(tmp_path / "run"), data=str(text), preset="softmax", carry_state="passing", **SMALL
    )
    with pytest.raises(ValueError, match="carry_state: needs a model whose states have a fixed"):
        train(options, say=lambda _: None)
    assert not (tmp_path / "run").exists()


def test_runs_of_older_versions_go_on(text, tmp_path):
    """Their options name nothing about states, and their checkpoints hold none."""
    options = TrainingOptions(str(tmp_path / "run"), data=str(text), steps=2, **SMALL)
    train(options, say=lambda _: None)
    noted = tmp_path / "run" / "options.json"
    kept = {k: v for k, v in json.loads(noted.read_text()).items() if not k.startswith("carry")}
    noted.write_text(json.dumps(kept))
    assert not (tmp_path / "run" / "checkpoint-2" / "carried").exists()
    longer = TrainingOptions(str(tmp_path / "run"), resume=True, steps=4)
    assert train(longer, say=lambda _: None).losses[-1][0] == 4
    carried = TrainingOptions(str(tmp_path / "run"), resume=True, carry_state="passing")
    with pytest.raises(ValueError, match="was started with carry_state='none', not 'passing'"):
        train(carried, say=lambda _: None)


def test_autocast(text, tmp_path):
    """States of windows and convolutions are in bf16 then, and sums in fp32."""
    options = {**SMALL, "preset": "based", "carry_state": "passing", "bf16": True, "save_every": 2}
    options["steps"] = 4
    whole = train(
        TrainingOptions(str(tmp_path / "run"), data=str(text), **options), say=lambda _: None
    )
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    again = train(TrainingOptions(str(tmp_path / "run"), resume=True), say=lambda _: None)
    assert again.losses == whole.losses


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Python source of the standard library."""
    path = tmp_path_factory.mktemp("source") / "source.txt"
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    text = "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    path.write_text(text[:600_000], encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_trained_model_learns_to_read_beyond_its_window(source, tmp_path):
    """Elementwise linear attention loses there, also after further training without states."""
    sizes = {"width": 32, "depth": 2, "heads": 2, "preset": "linear"}
    common = {"data": str(source), "context": 32, "batch": 8, "device": "cpu"}
    short = TrainingOptions(
        str(tmp_path / "short"), steps=300, learning_rate=1e-2, **common, **sizes
    )
    train(short, say=lambda _: None)
    bits = {}
    for mode in ("none", "passing", "document"):
        more = TrainingOptions(
            str(tmp_path / mode),
            init_from=short.output,
            steps=150,
            learning_rate=3e-3,
            carry_state=mode,
            **common,
        )
        train(more, say=lambda _: None)
        heldout = read_tokens(Path(short.output) / "tokens")[1]
        model = load_checkpoint(more.output)[0]
        bits[mode] = [evaluate_windowed(model, heldout, n * 32).bits_per_byte for n in (1, 4, 16)]
    for mode in ("passing", "document"):
        assert bits[mode][1] < bits["none"][1] - 0.05, bits
        assert bits[mode][2] < bits["none"][2] - 0.2, bits
        assert bits[mode][2] < bits[mode][0] + 0.1, bits

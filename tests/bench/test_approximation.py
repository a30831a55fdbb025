"""The approximation bench measures what its name says, and its report can be read."""

import math
import sys

import pytest
import torch

from cumulant.bench.approximation import cases, trained
from cumulant.bench.reports.folder import Folder
from cumulant.models import CumulantForCausalLM, from_preset
from cumulant.text.options import TrainingOptions
from cumulant.text.train import train

SMALL = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_case_is_its_formula():
    """Loops give the same weights of a query, average of the values and distance of outputs."""
    q, k, v = (draw(1, 1, cases.LENGTH, n, seed=n) for n in (6, 6, 4))
    k = 0.5 * draw(1, 1, cases.LENGTH, 6, seed=1)
    found = cases.measure_orders(q, k, v, "random")
    squares, seen = 0.0, 0
    outs = {"exact": [], **{order: [] for order in cases.ORDERS}}
    for t in range(cases.LENGTH):
        x = (k[0, 0, : t + 1] @ q[0, 0, t]) / math.sqrt(6)
        squares, seen = squares + float(x.square().sum()), seen + t + 1
        for name, out in outs.items():
            w = (
                x.exp()
                if name == "exact"
                else sum(x**p / math.factorial(p) for p in range(name + 1))
            )
            out.append(w @ v[0, 0, : t + 1] / w.sum())
    outs = {name: torch.stack(out) for name, out in outs.items()}
    for case in found:
        expected = float((outs[case.order] - outs["exact"]).norm() / outs["exact"].norm())
        assert math.isclose(case.error, expected, rel_tol=1e-6)
        assert math.isclose(case.size, math.sqrt(squares / seen), rel_tol=1e-9)


def test_orders_converge_where_scores_are_small():
    q, k, v = (draw(2, 1, cases.LENGTH, 8, seed=s) for s in range(3))
    errors = [c.error for c in cases.measure_orders(0.1 * q, k, v, "random")]
    assert errors == sorted(errors, reverse=True)
    assert errors[4] < 1e-4 < errors[2] < 0.02 < errors[0]


@pytest.mark.parametrize("preset", ["softmax", "taylor", "higher_order"])
def test_recorded_queries_and_keys_are_the_model_s(preset):
    """What is recorded gives the mixer's own output, and recording leaves nothing behind."""
    torch.manual_seed(0)
    model = CumulantForCausalLM(from_preset(preset, num_key_value_heads=2, **SMALL)).eval()
    ids = torch.randint(0, 40, (2, cases.LENGTH))
    mixer = model.model.layers[1].mixer
    values, outs = [], []
    own = mixer.attend

    def spy(query, key, value, *rest, **options):
        values.append(value)
        outs.append(own(query, key, value, *rest, **options))
        return outs[-1]

    mixer.attend = spy
    with torch.inference_mode(), trained.recorded_heads(model) as found:
        model(ids, use_cache=False)
    assert list(found) == ["model.layers.0.mixer", "model.layers.1.mixer"]
    q, k = found["model.layers.1.mixer"]
    v = values[0].repeat_interleave(2, 1)
    expected = (
        cases.softmax_output(q, k, v) if preset == "softmax" else cases.taylor_output(q, k, v, 2)
    )
    assert torch.allclose(outs[0], expected, atol=1e-5)
    assert "attend" not in vars(model.model.layers[0].mixer)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("the cat sat on the mat. " * 400)
    options = TrainingOptions(
        output=str(folder / "model"), data=str(folder / "text.txt"), preset="softmax", width=16,
        depth=2, heads=2,
        context=32, batch=2, steps=2,
    )  # fmt: skip
    train(options, say=lambda line: None)
    return folder / "model"


@pytest.fixture
def cli(monkeypatch, capsys):
    from cumulant.__main__ import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["cumulant", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    return call


def test_the_command_writes_table_pictures_and_numbers(cli, run, tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "DIMS", (16, 64))
    code, out, _ = cli("bench", "approximation", "--output", tmp_path / "out", "--model", run)
    assert code == 0
    assert "order 2 is" in out
    kept = Folder.open(str(tmp_path / "out"))
    assert {c["kind"] for c in kept.rows()} == {"random", "normalised", "trained"}
    assert (
        len([c for c in kept.rows() if c["kind"] == "trained"]) == 2 * 2 * 5
    )  # layers, heads, orders
    assert kept.environment["torch"] == torch.__version__
    table = (tmp_path / "out" / "report.md").read_text()
    assert table.count(f"| {run}, layer") == 2
    for name in ("error.png", "error.svg", "exponential.png", "exponential.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 5000
    assert cli("bench", "approximation", "--output", tmp_path / "again", "--model", run)[0] == 0
    assert Folder.open(str(tmp_path / "again")).rows() == kept.rows()
    with monkeypatch.context() as patch:  # what is there is not measured again
        patch.setattr(cases, "measure_orders", None)
        patch.setattr(trained, "measure_orders", None)
        assert cli("bench", "approximation", "--output", tmp_path / "out", "--model", run)[0] == 0
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / "rows.jsonl").write_text((tmp_path / "out" / "rows.jsonl").read_text())
    assert cli("report", tmp_path / "drawn")[0] == 0
    assert (tmp_path / "drawn" / "report.md").read_text() == table
    assert (tmp_path / "drawn" / "error.svg").read_bytes() == (
        tmp_path / "out" / "error.svg"
    ).read_bytes()
    code, _, err = cli(
        "bench", "approximation", "--output", tmp_path / "out", "--model", run, "--seed", 1
    )
    assert code == 2
    assert "holds the report of another measurement" in err


def test_other_weights_are_another_measurement(run, tmp_path):
    weights = run / "model.safetensors"
    before, kept = trained.weights_digest(str(run)), weights.read_bytes()
    model = CumulantForCausalLM.from_pretrained(run)
    model.model.layers[0].mixer.out_proj.weight.data.mul_(2)
    try:
        model.save_pretrained(run)
        assert trained.weights_digest(str(run)) != before
    finally:
        weights.write_bytes(kept)
    assert trained.weights_digest(str(run)) == before


def test_mistakes(cli, run, tmp_path, monkeypatch):
    model = CumulantForCausalLM(from_preset("linear", **SMALL))
    code, _, err = cli(
        "bench", "approximation", "--output", tmp_path, "--model", tmp_path / "nowhere"
    )
    assert code == 2
    assert "checkpoint: no model at" in err
    (run / "tokens").rename(run / "kept")
    code, _, err = cli("bench", "approximation", "--output", tmp_path, "--model", run)
    (run / "kept").rename(run / "tokens")
    assert code == 2
    assert "keeps no held-out text; give the folder of a training run" in err
    with torch.inference_mode(), trained.recorded_heads(model) as found:
        model(torch.zeros(1, 4, dtype=torch.int64), use_cache=False)
    assert not found
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = cli("bench", "approximation", "--quick", "--output", tmp_path)
    assert code == 2
    assert err.strip() == "cumulant: plots need matplotlib: pip install 'cumulant[text]'"
    assert cli("bench", "approximately")[0] == 2
    code, _, err = cli("bench", "--quick", "--output", tmp_path / "bench")
    assert code == 2
    assert err.strip() == "cumulant: plots need matplotlib: pip install 'cumulant[text]'"
    assert not (tmp_path / "bench").exists()
    code, out, _ = cli("bench", "--help")
    assert code == 0
    assert "approximation" in out.splitlines()[-1]


def test_it_trains_only_what_is_missing(cli, run, tmp_path, monkeypatch):
    """A missing plotting library is an error before training; interrupted training goes on."""
    resumed = []
    monkeypatch.setattr(
        "cumulant.text.train.train", lambda options, say: resumed.append(options.resume)
    )
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "matplotlib", None)
        assert "plots need matplotlib" in cli("bench", "approximation", "--output", tmp_path)[2]
    assert not resumed
    (tmp_path / "models" / "softmax").mkdir(parents=True)
    (tmp_path / "models" / "softmax" / "options.json").write_text(
        (run / "options.json").read_text()
    )
    trained.train_small_model(tmp_path, "softmax", print)
    trained.train_small_model(tmp_path, "taylor", print)
    assert resumed == [True, False]


@pytest.mark.slow
def test_it_trains_what_it_needs(cli, tmp_path):
    """Without --model it trains two small models, and keeps them."""
    assert cli("bench", "approximation", "--output", tmp_path)[0] == 0
    table = (tmp_path / "report.md").read_text()
    assert table.count("| softmax, layer") == table.count("| taylor, layer") == 3
    again = cli("bench", "approximation", "--output", tmp_path)
    assert again[0] == 0
    assert "step" not in again[1]

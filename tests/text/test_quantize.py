"""`cumulant quantize`: a trained run in 8 and 4 bits, measured, generated with, not trained."""

from __future__ import annotations

import shutil

import pytest

from cumulant.cli import run_command
from cumulant.text.checkpoint import load_checkpoint
from cumulant.text.generate import SamplingOptions, generate
from cumulant.text.quantize import quantize_checkpoint


@pytest.fixture(scope="module")
def folder(run):
    return run.output


@pytest.mark.parametrize("bits", [8, 4])
def test_a_run_keeps_its_loss(bits, folder, tmp_path):
    before, after = quantize_checkpoint(folder, bits, str(tmp_path / "small"))
    assert (before.bits, after.bits) == (32, bits)
    assert after.weight_bytes < before.weight_bytes
    lost = after.bits_per_byte - before.bits_per_byte
    assert lost < (0.005 if bits == 8 else 0.15)  # at a width of 32; larger models lose less
    model, tokenizer = load_checkpoint(str(tmp_path / "small"))
    result = generate(model, tokenizer, "the cat", SamplingOptions(40, temperature=0.0))
    assert "sat on the" in result.text
    assert not list(tmp_path.glob(".*"))


def test_the_command(folder, tmp_path, capsys):
    small = str(tmp_path / "small")
    command = ["quantize", folder, "--bits", "4", "--output", small]
    assert run_command([*command, "--no-evaluate"]) == 0
    out = capsys.readouterr().out
    assert "32 bits" in out
    assert f"cumulant generate {small}" in out

    def refused(message, *arguments):
        with pytest.raises(ValueError) as caught:
            run_command(arguments)
        assert message in str(caught.value)

    refused(f"output: {small} holds something; name another folder", *command)
    refused("bits: expected 8 or 4, got 5", "quantize", folder, "--bits", "5")
    other = ["--output", f"{small}er"]
    refused("quantised already; quantise the original", "quantize", small, *other)
    what = f"weights of 4 bits cannot be trained; train the original, {folder}, and quantise"
    refused(what, "train", "--init-from", small, "--steps", "2", *other)


def test_an_interruption_leaves_nothing(folder, tmp_path, monkeypatch):
    from cumulant.models import CumulantForCausalLM

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(CumulantForCausalLM, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(folder, 8, str(tmp_path / "small"), evaluate=False)
    assert not list(tmp_path.iterdir())


def test_the_folder_where_one_is(folder, tmp_path, monkeypatch):
    inside = tmp_path / "run"
    shutil.copytree(folder, inside)
    monkeypatch.chdir(inside)
    assert run_command(["quantize", ".", "--no-evaluate"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run-8bit"]

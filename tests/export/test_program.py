"""Whole models as programs of `torch.export`: prompts of any length and steps, with states."""

import pytest
import torch

from cumulant.export import StatefulModel, export_program
from cumulant.models import PRESETS, CumulantForMaskedLM, from_preset

from .common import STEPS, eager_logits, read_in_pieces, small, two_rows

QUICK = ["linear", "flash"]  # the others take 5 to 70 seconds to export
SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in [*PRESETS, "wrapped", "gau", "grouped heads"]
    if name not in QUICK
]


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_programs(name):
    """A batch of two, a prompt in two pieces of other lengths than the example, and 200 steps."""
    model, ids = small(name), two_rows(STEPS)
    prompt, state = export_program(model, batch=2)
    step, _ = export_program(model, step=True, batch=2)
    programs = {True: step.module(), False: prompt.module()}

    def read(piece):
        nonlocal state
        logits, state = programs[piece.shape[1] == 1](piece, state)
        return logits

    with torch.no_grad():
        found = read_in_pieces(read, ids, STEPS)
    assert state.position.tolist() == [ids.shape[1]] * 2
    assert abs(found - eager_logits(model, ids)).max() < 1e-4


@pytest.mark.parametrize("name", ["gated_linear", pytest.param("based", marks=pytest.mark.slow)])
def test_saved_programs(name, tmp_path):
    """A program that was saved and loaded gives the same numbers."""
    model, ids = small(name), two_rows(0)
    program, state = export_program(model, batch=2)
    torch.export.save(program, tmp_path / "prompt.pt2")
    loaded = torch.export.load(tmp_path / "prompt.pt2")
    with torch.no_grad():
        logits, after = program.module()(ids, state)
        same, same_state = loaded.module()(ids, state)
    assert torch.equal(logits, same)
    assert type(same_state) is type(after)
    assert all(torch.equal(x, same_state.tensors()[name]) for name, x in after.tensors().items())


@pytest.mark.parametrize("name", [*PRESETS, "wrapped"])
def test_the_model_with_states(name):
    """`StatefulModel` is the model with a cache, and its states those of the programs."""
    model, ids = small(name), two_rows(6)
    stateful = StatefulModel(model)
    state = stateful.initial_state(2)

    def read(piece):
        nonlocal state
        logits, state = stateful(piece, state)
        return logits

    with torch.no_grad():
        found = read_in_pieces(read, ids, 6)
    assert abs(found - eager_logits(model, ids)).max() < 1e-4


def test_models_that_have_no_program():
    encoder = CumulantForMaskedLM(from_preset("softmax", is_causal=False, vocab_size=50))
    with pytest.raises(TypeError, match="model: expected a CumulantForCausalLM, got CumulantForM"):
        export_program(encoder)
    with pytest.raises(ValueError, match=r"model: is in training mode; call model.eval\(\) first"):
        export_program(small("linear").train())

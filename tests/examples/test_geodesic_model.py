"""The geodesic experiment's model against its formula and the law."""

import pytest
import torch

from .geodesic import SMALL, geometry, language_model, learned, model, polar


def test_the_learned_metric_is_positive_definite():
    metric = learned(6, 3)
    torch.nn.init.normal_(metric.out.weight, std=100)
    g = metric(100 * torch.randn(2, 50, 6))
    assert g.shape == (2, 50, 6, 6)
    assert torch.allclose(g, g.mT, rtol=0, atol=1e-14)
    eigenvalues = torch.linalg.eigvalsh(g)
    assert eigenvalues.min() >= torch.tensor(-1.0).exp() - 1e-12
    assert eigenvalues.max() <= torch.tensor(1.0).exp() + 3 + 1e-12
    assert eigenvalues.max() / eigenvalues.min() > 5
    # diag(exp s) + U Uᵀ and no more: off the diagonal the rank is that of U
    s = torch.tanh(metric.out(torch.tanh(metric.hidden(torch.ones(6)))))[:6]
    assert torch.linalg.matrix_rank(metric(torch.ones(6)) - torch.diag(s.exp()), tol=1e-9) == 3
    fresh = model.LearnedMetric(16, 4, 32)(torch.randn(20, 16)) - torch.eye(16)
    assert 1e-3 < fresh.abs().max() < 0.3


def gradients(lm, loss):
    lm.zero_grad()
    loss.backward()
    return [p.grad for p in lm.parameters()]


@pytest.mark.parametrize("flat", [False, True])
def test_whole_is_split_is_step(flat):
    """In logits, velocities and gradients."""
    lm = language_model(flat=flat)
    ids = torch.randint(0, 11, (3, 7))
    target = torch.randn(3, 7, 11)
    whole, velocity = lm(ids)
    expected = gradients(lm, (whole * target).sum() + velocity.sum())
    for sizes in ((3, 4), (1, 5, 1), (1,) * 7):
        parts, state = [], None
        for part in ids.split(sizes, 1):
            logits, state = lm(part, state)
            parts.append(logits)
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-12)
        assert torch.allclose(state, velocity, atol=1e-12)
        found = gradients(lm, (torch.cat(parts, 1) * target).sum() + state.sum())
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(found, expected))


def test_the_model_is_its_formula():
    """Loops give the same logits, and a logit depends on all earlier tokens of its row alone."""
    lm = language_model()
    ids = torch.randint(0, 11, (2, 6))
    logits, velocity = lm(ids)
    for row in range(2):
        w = torch.zeros(6)
        for t in range(6):
            e = lm.embedding[ids[row, t]]
            f, c = (lm.update.weight @ torch.cat((e, w)) + lm.update.bias).split(6)
            n = torch.sigmoid(f) * w + c
            x, w = geometry.geodesic(lm.metric, e, lm.speed * n / n.norm(), 2)
            expected = torch.stack(
                [lm.scale * (x @ word) + b for word, b in zip(lm.embedding, lm.bias)]
            )
            assert torch.allclose(logits[row, t], expected, atol=1e-12)
        assert torch.allclose(velocity[row], w, atol=1e-12)
    for t in range(6):
        other = ids.clone()
        other[0, t] = (ids[0, t] + 1) % 11
        changed = (lm(other)[0] - logits).abs().amax(-1)
        assert (changed[0, :t] < 1e-12).all()
        assert changed[0, t:].min() > 1e-9
        assert changed[1].max() < 1e-12


class Identity(torch.nn.Module):
    def forward(self, x):
        return torch.eye(x.shape[-1]).expand(*x.shape, x.shape[-1])


def test_flat_is_the_identity_metric():
    """And a model with a metric differs from the flat one, seeded alike, by its metric alone."""
    ids = torch.randint(0, 11, (2, 5))
    flat, curved = language_model(flat=True), language_model()
    straight, _ = flat(ids)
    assert (curved(ids)[0] - straight).abs().max() > 1e-2
    curved.metric = Identity()
    assert torch.allclose(curved(ids)[0], straight, atol=1e-12)


def test_checkpointing_changes_nothing():
    ids, target = torch.randint(0, 11, (2, 5)), torch.randn(2, 5, 11)
    plain, saving = language_model(), language_model(checkpointing=True)
    (a, v), (b, w) = plain(ids), saving(ids)
    assert torch.equal(a, b)
    assert torch.equal(v, w)
    found, expected = gradients(saving, (b * target).sum()), gradients(plain, (a * target).sum())
    assert all(g.any() and torch.allclose(f, g, atol=1e-12) for f, g in zip(found, expected))


def test_errors():
    for name in ("vocab_size", "dim", "rank", "hidden", "steps"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            model.GeodesicLanguageModel(**{**SMALL, name: 0})
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        geometry.geodesic(polar, torch.ones(2), torch.ones(2), 0)
    lm = language_model()
    for shape in ((5,), (2, 0), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"ids: expected \[B, T\] with T at least 1, got \["):
            lm(torch.zeros(shape, dtype=torch.long))
    for shape in ((6,), (1, 6), (2, 5)):
        with pytest.raises(ValueError, match=r"velocity: expected \[B, D\] = \[2, 6\], got \["):
            lm(torch.zeros(2, 3, dtype=torch.long), torch.zeros(shape))

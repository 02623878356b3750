from __future__ import annotations

import numpy as np
import pytest
import torch

from alignez_gguf.directions import ccs, fit
from alignez_gguf.errors import QueryError
from tests.directions.planted import cosine, planted


def plain_loop(helpful, harmful, initial):
    """One probe, trained as the paper says, with nothing shared and nothing batched."""
    theta = initial.clone().requires_grad_()
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([theta, bias], lr=1e-3, weight_decay=0.01)

    def loss():
        p_helpful = torch.sigmoid(helpful @ theta + bias)
        p_harmful = torch.sigmoid(harmful @ theta + bias)
        consistent = (p_helpful - (1 - p_harmful)) ** 2
        return (consistent + torch.min(p_helpful, p_harmful)).mean()

    for _ in range(1000):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return theta.detach(), torch.sigmoid(helpful @ theta + bias).detach(), loss().item()


def test_batched_training_equals_a_plain_loop_over_layers_and_probes():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 20, 12, generator=generator)
    initial = 0.01 * torch.randn(2, 2, 12, generator=generator)
    trained_on = torch.ones(2, 20, dtype=torch.bool)
    trained_on[1, 15:] = False

    theta, p, loss = ccs.train(x, initial, trained_on)

    for layer in range(2):
        for probe in range(2):
            helpful, harmful = x[layer][:, trained_on[probe]]
            expected = plain_loop(helpful, harmful, initial[layer, probe])
            np.testing.assert_allclose(theta[layer, probe], expected[0], atol=2e-3)
            np.testing.assert_allclose(p[layer, probe, 0, trained_on[probe]], expected[1], atol=2e-3)
            assert loss[layer, probe] == pytest.approx(expected[2], rel=1e-3, abs=1e-5)


def test_finds_a_planted_direction_and_says_which_class_is_one():
    direction, helpful, harmful = planted(3, 80, 48)
    found = fit("ccs", helpful, harmful)
    assert found.vectors.shape == (3, 1, 48)
    assert found.vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=-1), 1, atol=1e-5)
    assert cosine(found.vectors, direction) > 0.75  # towards helpful, so positive
    assert (found.accuracy > 0.9).all()
    assert (np.abs(found.p_helpful - found.p_harmful) > 0.9).all()
    assert found.loss is not None
    assert (found.loss < 0.05).all()


def test_swapped_pairs_do_not_matter_and_ignored_personas_do():
    def found(**flaws):
        direction, helpful, harmful = planted(3, 80, 64, **flaws)
        return cosine(fit("ccs", helpful, harmful).vectors, direction)

    clean = found()
    assert found(swapped=0.3) > clean - 0.1
    assert found(ignored=0.5) < clean - 0.1


def test_classes_are_not_centred_apart():
    """A shift of one class is what tells the classes apart; it must survive the normalisation."""
    rng = np.random.default_rng(0)
    shift = np.zeros(16)
    shift[3] = 4.0
    noise = rng.standard_normal((2, 1, 60, 16))
    found = fit("ccs", noise[0] + shift, noise[1])
    assert found.vectors[0, 0, 3] > 0.7


def test_shift_and_scale_of_the_embeddings_do_not_matter():
    _, helpful, harmful = planted(1, 40, 16)
    plain = fit("ccs", helpful, harmful)
    moved = fit("ccs", 50 * helpful + 7, 50 * harmful + 7)
    np.testing.assert_allclose(moved.vectors, plain.vectors, atol=5e-3)


def test_result_depends_on_the_seed_alone(monkeypatch):
    _, helpful, harmful = planted(5, 30, 16)
    whole = fit("ccs", helpful, harmful, seed=3)
    threads = torch.get_num_threads()
    monkeypatch.setattr(ccs, "_CHUNK_BYTES", 2 * 2 * 30 * 16 * 4)
    in_chunks = fit("ccs", helpful.astype(np.float32), list(harmful), seed=3)
    other_seed = fit("ccs", helpful, harmful, seed=4)
    np.testing.assert_allclose(in_chunks.vectors, whole.vectors, atol=2e-3)
    np.testing.assert_allclose(in_chunks.accuracy, whole.accuracy, atol=0.02)
    assert np.abs(other_seed.vectors - whole.vectors).max() > 1e-4
    assert torch.get_num_threads() == threads


def test_labels_without_a_difference_are_not_predicted_on_held_out_pairs():
    rng = np.random.default_rng(0)
    helpful, harmful = rng.standard_normal((2, 4, 60, 120))
    found = fit("ccs", helpful, harmful)
    assert abs(found.accuracy.mean() - 0.5) < 0.1
    assert found.loss is not None
    assert found.loss.max() < 0.1  # a low loss says nothing by itself


def test_equal_embeddings_are_survived():
    x = np.ones((1, 10, 8), np.float16)
    found = fit("ccs", x, x)
    assert np.isfinite(found.vectors).all()
    np.testing.assert_allclose(found.accuracy, 0.5)


def test_what_cannot_be_fitted_is_refused():
    x = np.ones((1, 10, 8))
    with pytest.raises(QueryError, match="5 pairs are too few"):
        fit("ccs", x[:, :5], x[:, :5])
    with pytest.raises(ValueError, match="one direction"):
        fit("ccs", x, x, rank=2)
    with pytest.raises(ValueError, match=r"layer 0 .*NaN"):
        fit("ccs", x * np.nan, x)
    with pytest.raises(ValueError, match="share one shape"):
        fit("ccs", x, x[:, :9])

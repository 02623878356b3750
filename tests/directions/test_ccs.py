from __future__ import annotations

import numpy as np
import pytest
import torch

from alignez_gguf.directions import ccs, fit, probe_training
from alignez_gguf.directions.probe_training import train
from alignez_gguf.errors import AlignezError, QueryError
from tests.directions.planted import cosine, planted


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices as small as these are slower with two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plain_loop(helpful, harmful, initial, weights=None, squared_min=False):
    """One probe, trained as the paper says, with nothing shared and nothing batched."""
    theta = initial.clone().requires_grad_()
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([theta, bias], lr=1e-3, weight_decay=0.01)
    weights = torch.ones(len(helpful)) if weights is None else weights

    def loss():
        p_helpful = torch.sigmoid(helpful @ theta + bias)
        p_harmful = torch.sigmoid(harmful @ theta + bias)
        consistent = (p_helpful - (1 - p_harmful)) ** 2
        confident = torch.min(p_helpful, p_harmful)
        if squared_min:
            confident = confident**2
        return ((consistent + confident) * weights).sum() / weights.sum()

    for _ in range(1000):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return theta.detach(), torch.sigmoid(helpful @ theta + bias).detach(), loss().item()


@pytest.mark.parametrize("squared_min", [False, True])
@pytest.mark.parametrize("n_layer", [1, 2])
def test_batched_training_equals_a_plain_loop_over_layers_and_probes(n_layer, squared_min):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_layer, 2, 20, 12, generator=generator)
    initial = 0.01 * torch.randn(n_layer, 3, 12, generator=generator)
    weights = torch.ones(3, 20)
    weights[1, 15:] = 0
    weights[2] = torch.linspace(0.1, 3, 20)

    theta, p, loss = train(x, initial, weights / weights.sum(1, keepdim=True), squared_min=squared_min)

    for layer in range(n_layer):
        for probe in range(3):
            counted = weights[probe] > 0
            helpful, harmful = x[layer][:, counted]
            expected = plain_loop(
                helpful, harmful, initial[layer, probe], weights[probe, counted], squared_min
            )
            np.testing.assert_allclose(theta[layer, probe], expected[0], atol=2e-3)
            np.testing.assert_allclose(p[layer, probe, 0, counted], expected[1], atol=2e-3)
            assert loss[layer, probe] == pytest.approx(expected[2], rel=1e-3, abs=1e-5)


def test_packed_products_are_products():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 40, 70, generator=generator)
    times_rows, times_columns = probe_training._products(rows, 16)
    theta, slopes = torch.randn(1, 16, 70, generator=generator), torch.randn(1, 16, 40, generator=generator)
    np.testing.assert_allclose(times_rows(theta), theta.double() @ rows[0].T.double(), atol=1e-4)
    np.testing.assert_allclose(times_columns(slopes), slopes.double() @ rows[0].double(), atol=1e-4)


def test_a_torch_without_the_packing_operators_gives_the_same_probes(monkeypatch):
    _, helpful, harmful = planted(1, 30, 16)
    packed = fit("ccs", helpful, harmful)
    monkeypatch.setattr(probe_training, "_can_pack", lambda: False)
    np.testing.assert_allclose(fit("ccs", helpful, harmful).vectors, packed.vectors, atol=2e-3)


@pytest.mark.parametrize(
    ("options", "weighted"),
    [({}, False), ({"squared_min": True, "centring": "none"}, True)],
)
def test_a_fit_is_the_best_of_ten_plain_probes_and_tells_how_far_the_others_lie(options, weighted):
    n_pairs, n_embd = 24, 40
    _, helpful, harmful = planted(1, n_pairs, n_embd)
    helpful, harmful = 3 * helpful + 1, 3 * harmful + 1
    weights = np.linspace(1, 4, n_pairs) if weighted else None
    found = fit("ccs", helpful, harmful, seed=5, weights=weights, **options)

    x = np.concatenate([helpful[0], harmful[0]])
    repeated = np.tile(np.ones(n_pairs) if weights is None else weights, 2)
    if options.get("centring") != "none":
        x = x - np.average(x, axis=0, weights=repeated)
    x = x / np.sqrt(np.average((x**2).mean(axis=1), weights=repeated))
    x = torch.from_numpy(x.astype(np.float32))
    initial = np.random.default_rng([5, 0]).standard_normal((16, n_embd))[:10] * 0.01 / np.sqrt(n_embd)
    fits = [
        plain_loop(
            x[:n_pairs],
            x[n_pairs:],
            torch.from_numpy(start.astype(np.float32)),
            torch.from_numpy(repeated[:n_pairs].astype(np.float32)),
            options.get("squared_min", False),
        )
        for start in initial
    ]
    best = min(range(10), key=lambda probe: fits[probe][2])
    theta = torch.stack([fit[0] / fit[0].norm() for fit in fits]).numpy()
    cosines = np.abs(theta @ theta[best])
    assert abs(found.vectors[0, 0] @ theta[best]) > 0.9999
    assert found.loss[0] == pytest.approx(fits[best][2], rel=1e-3, abs=1e-5)
    assert found.spread[0] == pytest.approx(1 - np.delete(cosines, best).mean(), abs=2e-3)
    assert found.flipped[0] == pytest.approx((theta @ theta[best] < 0).mean())
    assert found.p_helpful[0] == pytest.approx(
        np.average(fits[best][1], weights=repeated[:n_pairs]), abs=2e-3
    )


def test_restarts_agree_where_there_is_one_direction_and_differ_where_there_is_none():
    _, helpful, harmful = planted(2, 80, 6, gap=12)
    assert fit("ccs", helpful, harmful).spread.max() < 0.1
    noise = np.random.default_rng(0).standard_normal((2, 2, 20, 400))
    assert fit("ccs", *noise).spread.min() > 0.5


def test_centring_per_class_is_refused_with_the_reason():
    x = np.ones((1, 10, 8))
    with pytest.raises(AlignezError, match=r"subtracts .* what tells them apart.* choose centring 'pooled'"):
        fit("ccs", x, x, centring="per-class")
    with pytest.raises(ValueError, match="no centring 'median'; choose 'pooled' or 'none'"):
        fit("ccs", x, x, centring="median")


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
    torch.set_num_threads(2)
    monkeypatch.setattr(ccs, "_CHUNK_BYTES", 2 * 2 * 30 * 16 * 4)
    in_chunks = fit("ccs", helpful.astype(np.float32), list(harmful), seed=3)
    other_seed = fit("ccs", helpful, harmful, seed=4)
    np.testing.assert_allclose(in_chunks.vectors, whole.vectors, atol=2e-3)
    np.testing.assert_allclose(in_chunks.accuracy, whole.accuracy, atol=0.02)
    assert np.abs(other_seed.vectors - whole.vectors).max() > 1e-4
    assert torch.get_num_threads() == 2


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

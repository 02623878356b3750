from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from alignez_gguf.control.edits import (
    LayerEdit,
    apply,
    apply_to_block,
    apply_to_mlp,
    check_strength,
    edits_sha256,
    orthonormal_rows,
    paper_edits,
    span_edits,
)
from alignez_gguf.control.gate import Gate
from alignez_gguf.directions.base import Directions
from alignez_gguf.errors import SteeringError

RNG = np.random.default_rng(11)

N_EMBD = 24


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def directions(vectors, p_helpful, p_harmful):
    n_layer = len(vectors)
    return Directions(
        "ccs",
        np.asarray(vectors, np.float32),
        np.asarray(p_helpful, np.float32),
        np.asarray(p_harmful, np.float32),
        np.ones(n_layer, np.float32),
    )


def test_removal_leaves_nothing_inside_the_given_span_and_everything_outside(rng):
    rows = rng.normal(size=(3, N_EMBD))
    x = rng.normal(size=(5, N_EMBD))
    projector = rows.T @ np.linalg.inv(rows @ rows.T) @ rows

    steered = apply_to_mlp(x, LayerEdit(remove=rows))

    np.testing.assert_allclose(steered, x - x @ projector, atol=1e-5)


def test_rank_one_removal_is_the_equation_of_the_paper(rng):
    theta, x = rng.normal(size=N_EMBD) * 13, rng.normal(size=N_EMBD)
    expected = x - (x @ theta) / (theta @ theta) * theta
    np.testing.assert_allclose(apply_to_mlp(x, LayerEdit(remove=theta)), expected, atol=1e-6)


def test_strength_scales_removal_and_addition_and_zero_is_off(rng):
    edit = LayerEdit(add=rng.normal(size=N_EMBD), remove=rng.normal(size=(2, N_EMBD)))
    x = rng.normal(size=(4, N_EMBD))
    full = apply(x, edit, 1.0)
    np.testing.assert_array_equal(apply(x, edit, 0.0), x)
    np.testing.assert_allclose(apply(x, edit, 0.25), x + 0.25 * (full - x), atol=1e-6)


def test_addition_adds_the_vector_to_each_row(rng):
    vector, h = rng.normal(size=N_EMBD).astype(np.float32), rng.normal(size=(3, N_EMBD))
    np.testing.assert_allclose(apply_to_block(h, LayerEdit(add=vector), 2.0), h + 2 * vector)


def test_dependent_rows_are_dropped_and_later_ones_survive(rng):
    a, b = rng.normal(size=(2, N_EMBD))
    edit = LayerEdit(remove=np.stack([a, 2 * a, np.zeros(N_EMBD), b, a - b]))
    assert edit.rank == 2
    assert np.linalg.matrix_rank(np.vstack([edit.remove, a, b]), tol=1e-5) == 2


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_length_of_the_directions_does_not_matter(rng, scale):
    rows = rng.normal(size=(2, N_EMBD))
    np.testing.assert_allclose(orthonormal_rows(rows * scale), orthonormal_rows(rows), atol=1e-6)


def test_nearly_parallel_rows_come_out_orthonormal(rng):
    a, b = rng.normal(size=(2, N_EMBD))
    rows = orthonormal_rows(np.stack([a, a + 1e-3 * b]))
    np.testing.assert_allclose(rows @ rows.T, np.eye(2), atol=1e-6)


def test_orthonormal_rows_are_kept_bit_for_bit(rng):
    rows = orthonormal_rows(rng.normal(size=(4, N_EMBD)))
    np.testing.assert_array_equal(LayerEdit(remove=rows).remove, rows)


def test_edit_owns_its_arrays(rng):
    given = rng.normal(size=N_EMBD).astype(np.float32)
    edit = LayerEdit(add=given)
    given[:] = 0
    assert edit.add is not None
    assert edit.add.any()
    with pytest.raises(ValueError, match="read-only"):
        edit.add[0] = 1


def test_decision_rank_and_scale_describe_the_edit():
    add, remove = np.full(4, 2.0), np.eye(4)[:2]
    assert [LayerEdit(*args).decision for args in [(), (add,), (None, remove), (add, remove)]] == [
        "none",
        "add",
        "remove",
        "remove+add",
    ]
    assert LayerEdit(add=np.zeros(4)).decision == "none"
    assert LayerEdit(add, remove).rank == 2
    assert LayerEdit(add).scale == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"add": [1.0, np.nan]}, "NaN"),
        ({"remove": [np.inf, 0.0]}, "infinite"),
        ({"add": [1e39, 0.0]}, "infinite in float32"),
        ({"add": [[1.0, 2.0]]}, r"\[n_embd\]"),
        ({"remove": np.zeros((2, 3, 4))}, r"\[k, n_embd\]"),
        ({"remove": np.zeros((2, 3))}, "all zero"),
        ({"add": np.ones(3), "remove": np.ones(4)}, "n_embd"),
        ({"add": np.array(["a", "b"])}, "real numbers"),
        ({"add": np.array([1j, 2.0])}, "real numbers"),
        ({"add": []}, "shape"),
    ],
)
def test_malformed_edits_are_refused(arguments, message):
    with pytest.raises(SteeringError, match=message):
        LayerEdit(**arguments)


@pytest.mark.parametrize("strength", [-0.1, np.nan, np.inf, 1e39, "x", None])
def test_negative_and_non_finite_strengths_are_refused(strength):
    with pytest.raises(SteeringError, match="strength"):
        check_strength(strength)


def test_paper_removes_theta_harm_and_adds_theta_help_scaled_to_the_gap():
    theta = np.zeros((4, 1, N_EMBD))
    theta[:, 0, 3] = 1
    gap = np.zeros((4, N_EMBD))
    gap[:, 3], gap[:, 5] = 2.5, 9.0
    found = directions(theta, p_helpful=[0.1, 0.9, 0.3, 0.2], p_harmful=[0.9, 0.1, 0.2, 0.4])

    edits = paper_edits(found, gap)

    assert {layer: edit.decision for layer, edit in edits.items()} == {0: "remove", 1: "add"}
    np.testing.assert_allclose(np.abs(edits[0].remove), theta[0])
    np.testing.assert_allclose(edits[1].add, 2.5 * theta[1, 0])


def test_paper_threshold_and_layers_restrict_the_rule():
    theta = np.eye(N_EMBD)[:3, None]
    found = directions(theta, p_helpful=[0.1, 0.2, 0.1], p_harmful=[0.95, 0.8, 0.95])
    gap = np.ones((3, N_EMBD))
    assert sorted(paper_edits(found, gap, threshold=0.9)) == [0, 2]
    assert sorted(paper_edits(found, gap, threshold=0.9, layers=[1, 2])) == [2]


def test_paper_decides_alike_whatever_the_sign_of_the_vector():
    theta = np.eye(N_EMBD)[:1, None]
    gap = np.arange(N_EMBD)[None] + 1.0
    added = [paper_edits(directions(v, [0.9], [0.1]), gap)[0].add for v in (theta, -theta)]
    np.testing.assert_array_equal(added[0], added[1])


def test_remove_and_add_puts_the_share_of_the_gap_where_the_span_was(rng):
    v = orthonormal_rows(rng.normal(size=(3, N_EMBD)))[None]
    helpful, harmful = rng.normal(size=(2, N_EMBD))

    edit = span_edits(v, (helpful - harmful)[None], remove=True, amount=0.5)[0]
    steered = apply(harmful, edit)

    np.testing.assert_allclose(v[0] @ steered, 0.5 * v[0] @ (helpful - harmful), atol=1e-5)
    outside = np.eye(N_EMBD) - v[0].T @ v[0]
    np.testing.assert_allclose(outside @ steered, outside @ harmful, atol=1e-5)


def test_amount_alone_adds_and_layers_choose(rng):
    v = np.stack([orthonormal_rows(rng.normal(size=(2, N_EMBD))) for _ in range(4)])
    edits = span_edits(v, rng.normal(size=(4, N_EMBD)), remove=False, amount=1.0, layers=range(1, 3))
    assert {layer: edit.decision for layer, edit in edits.items()} == {1: "add", 2: "add"}


def test_layers_without_a_direction_are_left_alone():
    v = np.zeros((2, 1, N_EMBD))
    v[1, 0, 0] = 1
    assert sorted(span_edits(v, np.ones((2, N_EMBD)), remove=True, amount=0.5)) == [1]
    assert sorted(paper_edits(directions(v, [0, 0], [1, 1]), np.ones((2, N_EMBD)))) == [1]


def test_layer_that_the_model_does_not_have_is_refused():
    with pytest.raises(SteeringError, match="no layer 2"):
        span_edits(np.ones((2, 1, 1)), np.ones((2, 1)), remove=True, layers=[2])


def test_directions_and_gap_of_different_fits_are_refused():
    with pytest.raises(SteeringError, match="do not belong together"):
        span_edits(np.ones((2, 1, 4)), np.ones((3, 4)), remove=True)


def test_gain_multiplies_the_component_and_the_rest_stays() -> None:
    v = orthonormal_rows(RNG.standard_normal((2, 6)))
    x = RNG.standard_normal((4, 6))
    edited = apply_to_mlp(x, LayerEdit(remove=v, gain=[-1, 0.5], bias=np.ones(6)), 1.0)
    inside, rest = x @ v.T, x - x @ v.T @ v
    np.testing.assert_allclose(edited, rest + (inside * [0, 1.5]) @ v + 1, atol=1e-6)


@pytest.mark.parametrize("gain", [-1.0, 0.5, 5.0])
def test_edit_about_a_centre_leaves_the_centre_where_it_is(gain: float) -> None:
    directions, center = RNG.standard_normal((2, 6)), RNG.standard_normal(6)
    edit = LayerEdit.about(directions, center, gain)
    np.testing.assert_allclose(apply_to_mlp(center, edit), center, atol=1e-6)
    x = RNG.standard_normal(6)
    v = orthonormal_rows(directions)
    expected = x + gain * (x - center) @ v.T @ v
    np.testing.assert_allclose(apply_to_mlp(x, edit), expected, atol=1e-5)


def test_gain_of_minus_one_is_a_removal() -> None:
    v = orthonormal_rows(RNG.standard_normal((2, 6)))
    edit = LayerEdit(remove=v, gain=[-1, -1])
    assert edit.gain is None
    assert edits_sha256({0: edit}) == edits_sha256({0: LayerEdit(remove=v)})


@pytest.mark.parametrize(
    ("edit", "decision"),
    [
        ({"bias": np.ones(6)}, "add"),
        ({"remove": np.eye(6)[:1], "gain": [0.5]}, "boost"),
        ({"remove": np.eye(6)[:1], "gain": [0.5], "add": np.ones(6)}, "boost+add"),
        ({"remove": np.eye(6)[:1], "bias": np.ones(6)}, "remove+add"),
    ],
)
def test_decision_tells_boosts_and_biases(edit: dict[str, Any], decision: str) -> None:
    assert LayerEdit(**edit).decision == decision


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ({"gain": [1.0]}, "one number for each row"),
        ({"remove": np.eye(6)[:2], "gain": [1.0]}, "one number for each row"),
        ({"remove": np.ones((2, 6)), "gain": [1.0, 1.0]}, "orthonormal"),
        ({"remove": np.eye(6)[:1], "gain": [np.nan]}, "NaN"),
        ({"bias": np.ones((2, 6))}, "`bias` must have the shape"),
        ({"bias": np.ones(5), "remove": np.eye(6)[:1]}, "`bias` has width 5"),
        ({"bias": np.ones(5), "add": np.ones(6)}, "both have the width"),
    ],
)
def test_malformed_gain_or_bias_is_refused(edit: dict[str, Any], reason: str) -> None:
    with pytest.raises(SteeringError, match=reason):
        LayerEdit(**edit)


def test_sha256_tells_gains_and_biases_apart() -> None:
    v, b = np.eye(6)[:1], np.ones(6)
    edits = [
        LayerEdit(remove=v),
        LayerEdit(remove=v, gain=[0.5]),
        LayerEdit(remove=v, bias=b),
        LayerEdit(remove=v, add=b),
        LayerEdit(remove=v, gain=[0.5], bias=b),
    ]
    assert len({edits_sha256({0: edit}) for edit in edits}) == len(edits)


def test_sha256_tells_gates_apart() -> None:
    edits = {0: LayerEdit(add=np.ones(6))}
    gates = [None, *(Gate(np.array([3]), np.array([1.0]), threshold) for threshold in (0.0, 0.5))]
    assert len({edits_sha256(edits, gate) for gate in gates}) == len(gates)
    assert edits_sha256(edits, gates[1]) == edits_sha256(edits, Gate(np.array([3]), np.array([1.0]), 0.0))

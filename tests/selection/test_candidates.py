from __future__ import annotations

import pytest

from alignez_gguf.control.layer_ranges import span
from alignez_gguf.control.scope import Scope
from alignez_gguf.selection.candidates import AMOUNTS, Candidate, Source, layer_groups


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ((0, 1, 2, 3), "0-3"),
        ((5,), "5"),
        ((2, 3), "2-3"),
        ((0, 1, 2, 4), "0-2,4"),
        ((0, 2, 4), "0,2,4"),
        ((), ""),
    ],
)
def test_layers_are_written_as_people_write_them(layers: tuple[int, ...], text: str) -> None:
    assert span(layers) == text


@pytest.mark.parametrize("n_layer", [1, 5, 8, 9, 22, 32, 80])
def test_groups_are_neighbours_of_even_size(n_layer: int) -> None:
    layers = tuple(range(3, 3 + n_layer))
    groups = layer_groups(layers)
    assert sum(groups, ()) == layers
    assert len(groups) == min(8, n_layer)
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1


def test_only_additions_have_an_amount() -> None:
    assert AMOUNTS["remove"] == (0.0,)
    assert all(amount > 0 for operation in ("add", "remove+add") for amount in AMOUNTS[operation])  # type: ignore[index]


@pytest.mark.parametrize(
    ("candidate", "text"),
    [
        (Candidate(Source("mean", "prompt", 1), "remove", 0.0, (0, 1)), "mean rank 1, prompt, remove"),
        (
            Candidate(Source("svd", "response-mean", 2, "residual"), "add", 0.35, (0,)),
            "svd rank 2, response-mean (residual), add 0.35x",
        ),
        (
            Candidate(Source("ccs", "response", 1), "remove+add", 2.0, (0, 1, 2, 3)),
            "ccs rank 1, response, remove+add 2x",
        ),
        (
            Candidate(Source("mean", "refusal", 1), "add", 0.5, (0, 1), Scope("first", 6)),
            "mean rank 1, refusal, add 0.5x, first:6",
        ),
    ],
)
def test_candidate_is_told_in_a_line(candidate: Candidate, text: str) -> None:
    assert str(candidate) == text

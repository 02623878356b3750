from __future__ import annotations

import pytest

from alignez_gguf.control.scope import Scope
from alignez_gguf.errors import SteeringError


@pytest.mark.parametrize(
    ("text", "n_prompt", "positions"),
    [
        ("generation", 10, (9, None)),
        ("generation", 1, (0, None)),
        ("generation", 0, (0, None)),
        ("all", 10, (0, None)),
        ("first:1", 10, (9, 10)),
        ("first:3", 10, (9, 12)),
    ],
)
def test_scope_begins_with_the_token_that_decides_the_first_word(
    text: str, n_prompt: int, positions: tuple[int, int | None]
) -> None:
    scope = Scope.parse(text)
    assert scope.positions(n_prompt) == positions
    assert str(scope) == text
    assert Scope.parse(scope) is scope


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ALL",
        "first",
        "first:",
        "first:0",
        "first:-1",
        "first:1.5",
        "first:03",
        "first:" + "9" * 10,
        "generation ",
    ],
)
def test_unknown_scope_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(SteeringError, match="use generation, all or first:N"):
        Scope.parse(text)

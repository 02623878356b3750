from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from alignez_gguf.runtime.context import Context


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each decode has computed, as they go on."""
    sizes: list[int] = []
    decode = Context.decode

    def counted(self: Context, tokens: Sequence[int], *rest: Any) -> None:
        sizes.append(len(tokens))
        decode(self, tokens, *rest)

    monkeypatch.setattr(Context, "decode", counted)
    return sizes

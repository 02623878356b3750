"""What tests of several rooms count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each decode has computed, in whichever context, as they go on."""
    from alignez_gguf.runtime.context import Context

    sizes: list[int] = []
    decode = Context.decode

    def counted(self: Context, tokens: Sequence[int], *rest: Any) -> None:
        sizes.append(len(tokens))
        decode(self, tokens, *rest)

    monkeypatch.setattr(Context, "decode", counted)
    return sizes

"""As for the runtime: tiny models are quickest on one thread."""

from tests.runtime.conftest import _one_thread

__all__ = ["_one_thread"]

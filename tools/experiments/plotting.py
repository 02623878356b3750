"""What the tools that print tables and draw have in common."""

from __future__ import annotations

import sys
from typing import Any

from alignez_gguf.errors import MissingExtraError, require_extra

TABLE_WIDTH = 120
"""Columns of a table that goes into a file or a pipe."""


def pyplot() -> Any:
    """matplotlib's pyplot, which draws into files. Ends the program where matplotlib is missing."""
    try:
        with require_extra("report", "the plot", "leave it out with --no-plot"):
            import matplotlib as mpl
    except MissingExtraError as error:
        sys.exit(f"Error: {error}")
    mpl.use("Agg")  # needs no display
    from matplotlib import pyplot as plt

    return plt

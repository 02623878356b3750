"""What the tools that print tables and draw have in common."""

from __future__ import annotations

import sys
from typing import Any

TABLE_WIDTH = 120
"""Columns of a table that goes into a file or a pipe."""


def pyplot() -> Any:
    """matplotlib's pyplot, which draws into files. Ends the program where matplotlib is missing."""
    try:
        import matplotlib as mpl
    except ImportError:
        sys.exit(
            "Error: the plot needs matplotlib; run: pip install 'alignez-gguf[plots]', or leave it out with "
            "--no-plot"
        )
    mpl.use("Agg")  # needs no display
    from matplotlib import pyplot as plt

    return plt

"""The llama-cpp-python that the bindings are written for and the patches are made for."""

from __future__ import annotations

VERSION = "0.3.36"
"""The version of llama-cpp-python; the patches are made for the llama.cpp inside it."""
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

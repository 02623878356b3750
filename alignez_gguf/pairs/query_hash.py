"""Hashes the queries that a control file was made from, so that it can name them."""

from __future__ import annotations

import hashlib

QUERY_HASHES = "query_hashes"
"""Key of the recipe of a control file that holds the hashes of the queries of the fit."""


def query_hash(query: str) -> str:
    """Return the first 16 hex digits of the SHA-256 of a query, stripped and case-folded."""
    return hashlib.sha256(query.strip().casefold().encode("utf-8", "surrogatepass")).hexdigest()[:16]

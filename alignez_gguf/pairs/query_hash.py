"""The hash by which a control file remembers a query that it was made from."""

from __future__ import annotations

import hashlib

QUERY_HASHES = "query_hashes"
"""Key of the recipe of a control file under which the hashes of the queries of the fit are."""


def query_hash(query: str) -> str:
    """What a control file keeps of a query: 16 hex digits of SHA-256, of it stripped and case-folded."""
    return hashlib.sha256(query.strip().casefold().encode("utf-8", "surrogatepass")).hexdigest()[:16]

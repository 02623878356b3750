"""Which edit is best: candidates, their score, and the search. Knows nothing of engines."""

"""Finds the best edit: candidates, their score, and the search. Knows nothing of engines."""

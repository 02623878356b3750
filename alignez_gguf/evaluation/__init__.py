"""Evaluation: the answers of base, steered and aligned models are judged, counted and reported."""

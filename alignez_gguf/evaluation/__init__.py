"""Does it work? Answers of base, steered and aligned models, judged, counted and reported."""

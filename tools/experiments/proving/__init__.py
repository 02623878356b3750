"""The parts of `real_models.py`: models are fetched, exported, asked, counted and written about."""

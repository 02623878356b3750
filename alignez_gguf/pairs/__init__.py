"""Preference pairs, which a model writes itself."""

"""Judges of answers: rules, guard models, and models behind an endpoint."""

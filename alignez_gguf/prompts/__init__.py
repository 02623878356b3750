"""Reads tables of queries, and makes the prompts that a model is given of them."""

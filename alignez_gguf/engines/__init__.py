"""Engines that run a model: llama.cpp, transformers, and endpoints."""

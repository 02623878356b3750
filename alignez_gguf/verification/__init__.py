"""Verification: compares what llama.cpp computes under edits with numpy, layer by layer."""

"""Builds, installs and probes the patched llama-cpp-python."""

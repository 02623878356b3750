"""The engine over llama.cpp."""

"""The engine over PyTorch and transformers."""

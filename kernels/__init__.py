"""Hand-written kernels for GPT training: one op per file, each beside its PyTorch reference."""

__version__ = "0.1.0"

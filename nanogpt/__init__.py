"""GPT-2 training, fine-tuning, evaluation and sampling on hand-written kernels."""

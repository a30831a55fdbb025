"""The operators of PyTorch, one for each operation, with gradients, for all implementations."""

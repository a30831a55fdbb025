"""The operations, one a file: formula, checks and states. `cumulant.kernels` computes them."""

"""The operations as PyTorch sees them: one operator each, with its gradients, in front of every
implementation.
"""

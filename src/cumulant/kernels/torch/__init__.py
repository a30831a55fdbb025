"""Chunk-parallel implementation in plain PyTorch: O(T) time and memory, any device."""

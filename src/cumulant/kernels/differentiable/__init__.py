"""The operations in plain PyTorch, in O(T) time, differentiable any number of times.

Operators with hand-written backward passes know gradients of first order. Where more is asked for
(tangents, gradients of gradients, anything nested under `torch.func`), these take their place, with
the same inputs and specifications. Nothing is written in place and no value is read, but the bounds
of packed sequences.
"""

from __future__ import annotations

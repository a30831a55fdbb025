"""``python -m cumulant``, and so ``torchrun -m cumulant``."""

from .cli import main

main()

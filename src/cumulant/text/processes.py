"""Several processes of one run: which of them prints, and how all stop if one fails."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from transformers import TrainingArguments


class FailedElsewhere(ValueError):
    """The first process has failed and says why."""


def is_first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def in_first_process(arguments: TrainingArguments, work: Callable[[], None]) -> None:
    """Do `work` in the first process while the others wait; if it fails, all of them stop.

    Raises:
        FailedElsewhere: in the other processes, if `work` failed.
    """
    error: BaseException | None = None
    if arguments.process_index == 0:
        try:
            work()
        except BaseException as caught:  # raised again below, once the others know
            error = caught
    if arguments.world_size > 1:
        failed = torch.tensor([int(error is not None)], device=arguments.device)
        torch.distributed.broadcast(failed, 0)
        if error is None and failed.item():
            raise FailedElsewhere("the first process failed")
    if error is not None:
        raise error


def leave_processes() -> None:
    """End the connections to the other processes, at the end of a process.

    Otherwise their threads may still run when Python ends, which then aborts.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def all_agree(condition: bool, arguments: TrainingArguments) -> bool:
    """Whether the condition is true in every process."""
    if arguments.world_size == 1:
        return condition
    holds = torch.tensor([int(condition)], device=arguments.device)
    torch.distributed.all_reduce(holds, torch.distributed.ReduceOp.MIN)
    return bool(holds.item())

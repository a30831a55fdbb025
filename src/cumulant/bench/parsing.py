"""Strict command lines, which ignore nothing that the user typed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from typer.core import TyperCommand, TyperGroup


def _check_repetition(command: Any, ctx: Any, args: list[str]) -> tuple[list[str], list[Any]]:
    """Refuse an option of one value that is given twice.

    Returns the arguments that are no options, and the parameters as they were given.
    """
    _, extra, order = command.make_parser(ctx).parse_args(args=list(args))
    options = [
        p for p in order if p.param_type_name == "option" and not p.multiple and not p.is_eager
    ]
    for parameter, times in Counter(options).items():
        if times > 1:
            ctx.fail(
                f"{parameter.opts[0]}: given {times} times, but it takes one value; give it once"
            )
    return extra, order


class StrictCommand(TyperCommand):
    """A command that refuses an option of one value given twice.

    It also explains the arguments that a shell makes of an unquoted pattern.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        extra, order = _check_repetition(self, ctx, args)
        if extra and any("--data" in p.opts for p in order):
            ctx.fail(
                f"--data: {len(extra)} more names after it, {extra[0]} the first; quote a pattern"
                " ('*.txt'), repeat --data, or name the folder"
            )
        return list(super().parse_args(ctx, args))


class StrictGroup(TyperGroup):
    """A group that is itself a command, whose own options are given once, before a subcommand."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _check_repetition(self, ctx, args)
        return list(super().parse_args(ctx, args))

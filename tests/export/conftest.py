"""A trained run, from the tests of text."""

from ..text.conftest import run, text  # noqa: F401 (fixtures)

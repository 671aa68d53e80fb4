"""Errors and warnings about arguments, which name each argument as its reader writes it.

A message marks an argument as ``<name>`` or ``<name=value>``. Python shows ``name`` and
``name=value``; the command line shows ``--name`` and ``--name value``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Real
from typing import Any

_MARK = re.compile(r"<([a-z][a-z_]*)(?:=([^<>]*))?>")


class _NamesArguments(Exception):
    """A message with marks; ``str`` of it is the message for Python."""

    arguments: Collection[str] | None = None  # those that marks can name; None for any

    def __str__(self) -> str:
        return self.shown(lambda mark: mark[0][1:-1])

    def shown(self, show: Callable[[re.Match[str]], str]) -> str:
        """Returns the message with each mark as a function shows it."""
        known = self.arguments
        return _MARK.sub(
            lambda mark: show(mark) if known is None or mark[1] in known else mark[0], self.args[0]
        )


class ArgumentError(_NamesArguments, ValueError):
    """An argument that cannot be used, or the argument that would help."""


class ArgumentWarning(_NamesArguments, UserWarning):
    """A warning that names arguments."""


def as_option(argument: str) -> str:
    """Returns the option that an argument has by default: ``--pixel-range`` for pixel_range."""
    return f"--{argument.replace('_', '-')}"


def for_command_line(message: Exception | str, options: Mapping[str, str] | None = None) -> str:
    """Returns a message with options in place of the arguments that it names, if it names any.

    ``options`` are, by argument, those that have another name than `as_option` gives.
    """
    if not isinstance(message, _NamesArguments):
        return str(message)

    def option(mark: re.Match[str]) -> str:
        name, value = (options or {}).get(mark[1], as_option(mark[1])), mark[2]
        return name if value in (None, "True") else f"{name} {value}"

    return message.shown(option)


def at_least(least: int) -> Callable[[str], int]:
    """Returns the argparse type of whole numbers from ``least`` on."""

    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            message = f"must be an integer in [{least}, inf), got {text!r}"
            raise argparse.ArgumentTypeError(message) from None
        if number < least:
            raise argparse.ArgumentTypeError(f"must lie in [{least}, inf), got {number}")
        return number

    return whole_number


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises a TypeError or ValueError that names the setting, its value and its range."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number in [{low:g}, {high:g}], got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value!r}")


def check_choice(name: str, value: Any, choices: tuple[str, ...], rule: str = "") -> None:
    """Raises an error that lists the values of a setting, and the method of a rule."""
    if value in choices if isinstance(value, str) else rule and callable(getattr(value, rule, "")):
        return
    listed = " or ".join(map(repr, choices))
    other = f", or an object with a method {rule}()" if rule else ""
    raise ValueError(f"{name} must be {listed}{other}, got {value!r}")


def check_pixels(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Raises an error for a mean or standard deviation of pixels that are not in [0, 1]."""
    for name, values, wanted in (("mean", mean, "[0, 1]"), ("std", std, "(0, 1]")):
        for value in values or ():
            if not 0 <= value <= 1 or (value == 0 and name == "std"):
                remedy = (
                    f"for grey levels up to 255, pass {value / 255:.4g}"
                    if 1 < value <= 255
                    else "pass the values used in training"
                )
                raise ArgumentError(
                    f"<{name}> is {value:g}, but pixels in [0, 1] need {wanted}: {remedy}"
                )

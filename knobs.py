"""Flags as fields of dataclasses: train.py's Config and the rows of methods.py are made of them.

    knob          a field that is a flag: a default and an explanation
    unread        an inherited one that a row does not read
    Count, ...    types with bounds
    check_bounds  ValueError for a value beyond them

start.py makes the command line of them. The standard library is enough.
"""

import operator
from dataclasses import field
from typing import Annotated, Any, get_type_hints


def knob(default: Any, text: str) -> Any:
    """A field that is a flag: its default, and what it is, its unit and its source."""
    about = {"help": text.replace("%", "%%")}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=about)
    return field(default=default, metadata=about)


def unread(default: Any) -> Any:
    """An inherited knob that a row does not read: no flag."""
    return field(default=default, init=False)


OPERATORS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
NotNegative = Annotated[float, ">= 0"]
Positive = Annotated[float, "> 0"]
Share = Annotated[float, ">= 0", "<= 1"]
Fraction = Annotated[float, "> 0", "<= 1"]
HeldOut = Annotated[float, ">= 0", "< 1"]
Natural = Annotated[int, ">= 0"]
Count = Annotated[int, ">= 1"]
Several = Annotated[int, ">= 2"]


def check_bounds(knobs: Any) -> None:
    """ValueError naming the first knob beyond the bounds of its type, its value and the bounds."""
    for name, hint in get_type_hints(type(knobs), include_extras=True).items():
        bounds, value = getattr(hint, "__metadata__", ()), getattr(knobs, name)
        for sign, limit in map(str.split, bounds):
            if not OPERATORS[sign](value, float(limit)):
                raise ValueError(f"--{name} {value}: must be {' and '.join(bounds)}")

"""BatchNorms with one fault each, and correct ones: what an audit must tell apart.

Every fault is one that a public tracker knows, or one of its class; the class's docstring says which ("Cf.":
one of its class). An instance is called as a plug-in's function is.
"""

from __future__ import annotations

import re
from types import ModuleType

from bnaudit.defects import correct, gradients, normalization, running, statistics, tensors
from bnaudit.defects.layer import Layer

WORDS = re.compile(r"(?<=[a-z\d])(?=[A-Z])|(?<=[a-z])(?<!loat)(?=\d)")
"""Where a word begins in a class's name: at a capital, or at a number other than that of float16."""


def _layers(*modules: ModuleType) -> dict[str, type[Layer]]:
    """The layers that are defined in the modules, by name: OnePassVariance is one-pass-variance."""
    return {
        WORDS.sub("-", name).lower(): found
        for module in modules
        for name, found in vars(module).items()
        if isinstance(found, type) and found.__module__ == module.__name__
    }


FAULTS = _layers(statistics, normalization, running, gradients, tensors)

CORRECT = _layers(correct)

RESEMBLES = {"corrected-two-pass": "two-pass@cpu", "welford-tree": "welford@cpu"}
"""Yardsticks that correct variants are like: a scenario in which one must fail excuses the variant."""

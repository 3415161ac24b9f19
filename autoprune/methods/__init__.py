"""The pruning methods, by name."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any, cast

from ..policy.budget import Budget
from .autoprune import AutoPrune
from .autoprune_reference import AutoPruneReference
from .base import Method
from .cdpruner import CDPruner
from .dart import DART
from .divprune import DivPrune
from .fastervlm import FasterVLM
from .fastv import FastV
from .folder import Folder
from .hiprune import HiPrune
from .no_image import NoImage
from .pact import PACT
from .pdrop import PDrop
from .pooling import Pooling
from .prumerge import PruMerge
from .random import Random
from .scope import SCOPE
from .sparsevlm import SparseVLM
from .tome import ToMe
from .tuned_file import TunedFile
from .turbo import Turbo
from .uniform import Uniform
from .visionzip import VisionZip
from .vispruner import VisPruner
from .vtw import VTW

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        AutoPrune,
        AutoPruneReference,
        FastV,
        PDrop,
        SparseVLM,
        DART,
        PACT,
        VTW,
        FasterVLM,
        VisPruner,
        VisionZip,
        PruMerge,
        HiPrune,
        DivPrune,
        CDPruner,
        SCOPE,
        ToMe,
        Turbo,
        Folder,
        Pooling,
        Uniform,
        Random,
        NoImage,
    )
}


def list_methods() -> list[str]:
    """Names of all methods, as `create` takes them."""
    return list(METHODS)


def as_released(name: str) -> tuple[str, ...]:
    """The settings with which a method comes closest to its authors' code, as "option=value".

    None for a method that does so by itself, or of which there is no authors' code.
    """
    return tuple(f"{option}={value}" for option, value in METHODS[name].released.items())


def create(name: str, /, budget: Budget | float, **options: Any) -> Method:
    """Build a method by name: `create("autoprune", budget=64, k0=0.3)`.

    Raises:
        ValueError: there is no such method, or it has no such option.
    """
    check_name(name)
    method: Any = METHODS[name]
    known = {field.name for field in dataclasses.fields(method)} - {"budget"}
    for option in options:
        if option not in known:
            listed = ", ".join(options_of(name))
            raise ValueError(f"{name} has no option {option!r}; it has {listed}")
    return cast(Method, method(budget=budget, **options))


def load_method(path: str | Path) -> Method:
    """The method of a file that `autoprune tune` wrote, whichever it is; see `Method.load`.

    Raises:
        ValueError: there is no such file, or it is damaged or of another release.
    """
    name = TunedFile.read(path).method
    check_name(name)
    return METHODS[name].load(path)


def options_of(name: str) -> dict[str, dataclasses.Field[Any]]:
    """A method's options beside the budget, as `dataclasses.fields` gives them.

    Methods that merge tokens themselves have no use for a `merger`, and say so where they are given one.
    """
    method: Any = METHODS[name]
    unused = {"budget", "merger"} if getattr(method, "merges", False) else {"budget"}
    return {field.name: field for field in dataclasses.fields(method) if field.name not in unused}


def check_name(name: str) -> None:
    """Raise ValueError if there is no such method, with one that is spelt alike."""
    if name not in METHODS:
        close = difflib.get_close_matches(name.lower(), METHODS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"there is no method {name!r}; {hint}choose one of {', '.join(METHODS)}")

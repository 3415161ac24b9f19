"""Methods, options and budgets from text: "1/9", "autoprune:k0=0.2", "k0=0.2"; with clear errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from ..policy.budget import Budget
from . import METHODS, as_released, create, list_methods, load_method, options_of
from .base import Method
from .tuned_file import is_tuned_file

_TOKENS = 64
"""The budget where none is given."""


def parse_budget(text: str) -> Budget:
    """`64`: visual tokens per layer; `1/9` or `11%`: share of the prompt's visual tokens. With " over batch"
    behind it, the mean over the prompts of a batch.

    Raises:
        ValueError: none of the three, not positive, not finite, or a share above 1; over a stream, whose state
            outlives a command.
    """
    amount, _, over = text.partition(" over ")
    if over.strip() == "batch":
        return replace(parse_budget(amount.strip()), over="batch")
    if over.strip() == "stream":
        raise ValueError(
            f"budget {text!r}: a stream is kept by a Fleet, in Python: AutoPrune(Budget.tokens(16, "
            'over="stream"), fleet=Fleet()); here, write "over batch"'
        )
    expected = "expected a number of tokens (64), a fraction (1/9) or a percentage (11%)"
    try:
        if "/" in text:
            numerator, denominator = (float(part) for part in text.split("/"))
            value = numerator / denominator
        else:
            value = float(text.removesuffix("%"))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"budget {text!r}: {expected}") from None
    share = "/" in text or text.endswith("%")
    value = value / 100 if text.endswith("%") else value
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"budget {text!r} must be finite and above 0; {expected}")
    if not share:
        return Budget.tokens(value)
    if value > 1:
        raise ValueError(f"budget {text!r} is more than all visual tokens; {expected}")
    return Budget.ratio(value)


def budget_text(budget: Budget) -> str:
    """A budget of tokens or a share, as `parse_budget` reads it.

    Raises:
        ValueError: it is of another kind.
    """
    share = Fraction(budget.value).limit_denominator(1000)
    texts = {
        "tokens": [f"{budget.value:g}", repr(budget.value)],
        "ratio": [f"{share.numerator}/{share.denominator}", f"{budget.value!r}/1"],
    }
    for text in texts.get(budget.kind, ()):
        if _amount(parse_budget(text)) == _amount(budget):
            return text
    raise ValueError(f"a budget of {budget} cannot be given on the command line; use it in Python")


def _amount(budget: Budget) -> tuple[Any, ...]:
    """How much it is, whatever it is a mean over."""
    return budget.kind, budget.value, budget.counted


def parse_methods(option: str, text: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """Label, name and options of each method in "autoprune:k0=0.2,beta=1,random", "all" or "released".

    Options follow a colon, separated by commas as the methods are. The text of a method is its
    label, unless it is given one: "steep@autoprune:k0=0.8". "released" is every method whose authors'
    code differs from its defaults, with the options that come closest to that code, as "fastervlm as released".

    Args:
        option: what the text was given to, for the message.

    Raises:
        ValueError: no method, or an option that follows none.
    """
    chosen: list[tuple[str, str, tuple[str, ...]]] = []
    takes_options = False
    for part in (part.strip() for part in text.split(",")):
        head, _, setting = part.partition(":")
        if not part:
            continue
        if "=" in head:
            if not takes_options:
                raise ValueError(f"option {part!r} follows no method; write method:{part}")
            label, name, options = chosen.pop()
            label = f"{label},{part}" if label.startswith(f"{name}:") else label
            chosen.append((label, name, (*options, part)))
        elif part == "all":
            takes_options = False
            chosen += [(name, name, ()) for name in list_methods()]
        elif part == "released":
            takes_options = False
            settings = {name: as_released(name) for name in list_methods()}
            chosen += [(f"{name} as released", name, own) for name, own in settings.items() if own]
        else:
            takes_options = bool(setting)
            label, at, name = head.rpartition("@")
            chosen.append((label if at else part, name, (setting,) if setting else ()))
    if not chosen:
        raise ValueError(f"{option} is empty; give names by commas, all, or released")
    return list(dict.fromkeys(chosen))


def build_method(
    name: str, budget: Budget | None, options: dict[str, Any], assignments: Sequence[str]
) -> Method:
    """A method from its name and options, or from the file that `autoprune tune` wrote.

    Args:
        name: as `autoprune methods` lists it, or a file that ends in .json.
        budget: for `autoprune_reference`, tokens are counted as that method counts them. None: 64 tokens, or
            that of the file.
        options: by name; None where the user gave none.
        assignments: further options as "name=value".

    Raises:
        ValueError: no such method or option, a value that does not fit, or a file that was tuned for
            another budget, or is none.
    """
    if is_tuned_file(name):
        return _tuned(name, budget, [*filter(options.get, options), *assignments])
    budget = Budget.tokens(_TOKENS) if budget is None else budget
    given = {key: value for key, value in options.items() if value is not None}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"option {assignment!r} is not of the form name=value")
        if key.strip() == "budget":
            raise ValueError(
                f"the budget is no option of a method, got {assignment!r}; give it as --budget {value}"
            )
        given[key.strip()] = _typed(name, key.strip(), value.strip())
    plain = budget.kind == "tokens" and budget.over == "prompt"
    amount = budget.value if name == "autoprune_reference" and plain else budget
    return create(name, amount, **given)


def _tuned(name: str, budget: Budget | None, changed: Sequence[str]) -> Method:
    """The method of a file, as it was tuned."""
    method = load_method(name)
    if changed:
        raise ValueError(
            f"{name!r} holds settings that were tuned together, and {changed[0]!r} would change them; leave "
            "it out, or name the method instead of the file"
        )
    if budget is not None and _amount(budget) != _amount(method.budget):
        raise ValueError(
            f"{name!r} was tuned for {method.budget}, not for {budget}; leave the budget out, or tune for it"
        )
    return method


def _typed(method: str, option: str, text: str) -> Any:
    """`text` as the type of that option's default; unknown options are left to `create`."""
    known = options_of(method) if method in METHODS else {}
    default = known[option].default if option in known else None
    if text.lower() == "none" and "None" in str(_annotation(method, option)):
        return None
    if f"'{text}'" in str(_annotation(method, option)) or f'"{text}"' in str(
        _annotation(method, option)
    ):
        return text
    if method in METHODS and "tuple" in str(_annotation(method, option)):
        return _numbers(option, text)
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, (int, float)):
            return type(default)(text)
    except (KeyError, ValueError):
        expected = (
            "true or false" if isinstance(default, bool) else f"a number ({type(default).__name__})"
        )
        raise ValueError(f"option {option} expects {expected}, got {text!r}") from None
    return text


def _annotation(method: str, option: str) -> Any:
    known = options_of(method) if method in METHODS else {}
    return known[option].type if option in known else ""


def _numbers(option: str, text: str) -> tuple[float, ...]:
    """ "2 6 15" or "2;6;15": commas already separate options."""
    try:
        return tuple(float(part) for part in text.replace(";", " ").replace(",", " ").split())
    except ValueError:
        raise ValueError(
            f"option {option} expects numbers such as '2 6 15', got {text!r}"
        ) from None

"""Architectures that transformers lacks, written for its own base classes."""

from __future__ import annotations


def register() -> None:
    """Make transformers' Auto classes know these architectures. Calling it again does nothing."""
    from . import cogvlm, senna

    cogvlm.register()
    senna.register()

"""The exceptions a user may want to catch; each message names the cause and the way out."""

from __future__ import annotations


class UnsupportedError(RuntimeError):
    """A model, cache or generation mode that pruning cannot serve correctly; raised before it runs."""

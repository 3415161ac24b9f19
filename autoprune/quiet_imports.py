"""Messages of other libraries that say nothing about a user's model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

NOISY_IMPORTS = ("torchao", "torch.utils._pytree")
"""Loggers that warn when transformers imports torchao, whether or not it is used."""


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Keep warnings of `NOISY_IMPORTS` away; the loggers are left as they were."""
    loggers = [logging.getLogger(name) for name in NOISY_IMPORTS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

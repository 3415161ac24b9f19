"""Models of the Hugging Face hub: what a name is, and what a failed download means."""

from __future__ import annotations

import re
from collections.abc import Iterator

_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def is_name(text: str) -> bool:
    """Whether `text` has the form of a hub name, owner/model."""
    return _NAME.fullmatch(text) is not None


def show_downloads() -> None:
    """Let the hub show its own progress bars; the bars of loading weights stay hidden."""
    from huggingface_hub import constants
    from huggingface_hub.utils import enable_progress_bars

    # The user's own switch has priority, and the hub would warn about it.
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()


def why(name: str, error: BaseException) -> str | None:
    """Why a model of the hub cannot be had, and the way out; None if the hub is not the reason.

    transformers wraps the hub's errors, so those behind `error` are looked at, too.
    """
    from huggingface_hub import errors, is_offline_mode

    causes = list(_causes(error))

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if among(errors.GatedRepoError):
        return (
            f"the model {name!r} is gated: accept its terms at https://huggingface.co/{name}, then "
            "log in with `hf auth login`"
        )
    if among(errors.RepositoryNotFoundError):
        return (
            f"there is no folder {name!r}, and the Hugging Face hub has no model of that name or it "
            "is private: check the name, or log in with `hf auth login`"
        )
    if is_offline_mode() and among(errors.LocalEntryNotFoundError):
        return (
            f"there is no folder {name!r}, and no complete model of that name in the local cache; "
            "HF_HUB_OFFLINE is set, so it is not downloaded: unset it, or copy the model into a folder"
        )
    if among(errors.LocalEntryNotFoundError, ConnectionError, TimeoutError):
        return (
            f"there is no folder {name!r}, no complete model of that name in the local cache, and the "
            "Hugging Face hub cannot be reached: check the connection and try again"
        )
    refused = [cause for cause in causes if isinstance(cause, errors.HfHubHTTPError)]
    if refused and not among(errors.EntryNotFoundError):
        return f"the Hugging Face hub refused to hand out {name!r}: {_first_line(refused[-1])}"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))

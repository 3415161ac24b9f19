"""Reading fields of a JSON object: each is checked, and what is wrong is named."""

from __future__ import annotations

import json
import reprlib
from typing import Any, NoReturn

from .errors import RequestError

_MISSING = object()

LEAVE_OUT = "leave it out"
"""What to do about most of what is not supported."""


def parse_json(body: bytes) -> Any:
    """The JSON in a body.

    Raises:
        RequestError: it is none, or holds NaN or Infinity, or is nested too deeply.
    """
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError:
        raise RequestError("the body is not UTF-8; send JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise RequestError(f"the body is not JSON: {error.msg} at {where}") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply; send a flat list of messages") from None
    except ValueError:
        # Python reads no whole number of more than 4300 digits.
        raise RequestError("the body holds a number with too many digits") from None


def _no_number(name: str) -> NoReturn:
    raise RequestError(f"the body holds {name}, which is no number in JSON")


class Fields:
    """The fields of one JSON object; each `take` checks and removes one, `finish` refuses the rest.

    A field that is null counts as one that is not there, as OpenAI's servers have it.

    Args:
        value: what should be an object.
        name: how messages call it; "" for the request itself.
    """

    def __init__(self, value: Any, name: str = "") -> None:
        self.name = name
        if not isinstance(value, dict):
            what = name or "the request"
            raise RequestError(
                f"{what} must be a JSON object, got {shown(value)}", param=name or None
            )
        self._left = dict(value)

    def path(self, field: str) -> str:
        """The full name of a field."""
        return f"{self.name}.{field}" if self.name else field

    def take(self, field: str, default: Any = _MISSING) -> Any:
        """The field as it is.

        Raises:
            RequestError: it is missing and has no default.
        """
        value = self._left.pop(field, None)
        if value is not None:
            return value
        if default is _MISSING:
            raise RequestError(f"{self.path(field)} is missing", param=self.path(field))
        return default

    def drop(self, field: str, value: Any) -> None:
        """Take the field out if it has this value."""
        if self._left.get(field) == value:
            del self._left[field]

    def wrong(self, field: str, expected: str, value: Any) -> RequestError:
        """The refusal of a value."""
        path = self.path(field)
        return RequestError(f"{path} must be {expected}, got {shown(value)}", param=path)

    def text(self, field: str, default: Any = _MISSING) -> Any:
        """A string that can be encoded: half of a surrogate pair is none."""
        value = self.take(field, default)
        if value is default:
            return value
        if not isinstance(value, str):
            raise self.wrong(field, "a string", value)
        return whole_text(value, self.path(field))

    def boolean(self, field: str, default: Any = _MISSING) -> Any:
        value = self.take(field, default)
        if value is not default and not isinstance(value, bool):
            raise self.wrong(field, "true or false", value)
        return value

    def integer(self, field: str, least: int, most: int, default: Any = _MISSING) -> Any:
        """A whole number; true and 1.0 are none."""
        value = self.take(field, default)
        if value is default:
            return value
        expected = f"a whole number from {least} to {most}"
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(field, expected, value)
        return value

    def number(self, field: str, least: float, most: float, default: Any = _MISSING) -> Any:
        """A number from `least` to `most`."""
        value = self.take(field, default)
        if value is not default:
            self.check_number(field, value, least, most)
        return value

    def check_number(self, field: str, value: Any, least: float, most: float) -> None:
        """Raise RequestError unless this is a number in that range."""
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not least <= value <= most
        ):
            raise self.wrong(field, f"a number from {least:g} to {most:g}", value)

    def array(self, field: str, least: int, most: int, default: Any = _MISSING) -> Any:
        value = self.take(field, default)
        if value is default:
            return value
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise self.wrong(field, f"a list of {least} to {most} entries", value)
        return value

    def finish(self, unsupported: dict[str, str], known: str) -> None:
        """Refuse every field that was not taken.

        Args:
            unsupported: fields that OpenAI has and this server has not, with what to do instead.
            known: what the object can hold, for the message.
        """
        for field, value in self._left.items():
            if value is None and field in unsupported:
                continue
            path = self.path(shown_name(field))
            if field in unsupported:
                raise RequestError(f"{path} is not supported: {unsupported[field]}", param=path)
            raise RequestError(f"{path} is not known here; there are {known}", param=path)


def whole_text(text: str, path: str) -> str:
    """The text, if a tokenizer can take it.

    Raises:
        RequestError: it holds half a surrogate pair, or a null character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(
            f"{path} holds half of a surrogate pair, which is no character", param=path
        ) from None
    if "\0" in text:
        raise RequestError(f"{path} holds a null character; leave it out", param=path)
    return text


def shown(value: Any) -> str:
    """A value in a message: short, and never a whole picture."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return shown_name(reprlib.repr(value))


def shown_name(name: str) -> str:
    """A name that the client chose, shortened, without what no console can print."""
    return (name if len(name) <= 60 else f"{name[:60]}...").encode("utf-8", "replace").decode()

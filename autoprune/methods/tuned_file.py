"""The file that `autoprune tune` writes: a method's settings, and which model they were found on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..contract import SummaryToken
from ..files import write_whole
from ..policy.budget import Budget
from ..policy.fleet import Fleet
from ..policy.rules import rule_from_dict

FORMAT = "autoprune tuned method"
FORMAT_VERSION = 1

# What tells one architecture from another, under the names that configurations use for it. Other
# entries change from one release of transformers to the next.
_SIZES = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "patch_size", "image_size"),
    *("depth", "embed_dim", "num_heads"),
)
_PARTS = ("text_config", "vision_config")
_FIELDS: dict[str, type] = {
    "autoprune": str,
    "model": dict,
    "budget": dict,
    "method": str,
    "settings": dict,
    "judged": dict,
    "prompts": dict,
}


@dataclass(frozen=True)
class ModelIdentity:
    """What tells one model from another by its configuration; weights are not looked at.

    fingerprint: digest of the sizes of decoder and vision tower. name: for the reader, not compared.
    """

    architecture: str
    layers: int
    hidden_size: int
    vocabulary: int
    fingerprint: str
    name: str = field(default="", compare=False)

    @classmethod
    def of(cls, model: Any, name: str = "") -> ModelIdentity:
        """The identity of a model of transformers."""
        config = model.config
        text = config.get_text_config()
        sizes = [
            {size: str(getattr(part, size, None)) for size in _SIZES}
            for part in (config, *(getattr(config, part, None) for part in _PARTS))
        ]
        digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:12]
        return cls(
            str(config.model_type),
            int(text.num_hidden_layers),
            int(text.hidden_size),
            int(text.vocab_size),
            digest,
            name,
        )

    def check(self, model: Any) -> None:
        """Raise ValueError if `model` is another one."""
        other = ModelIdentity.of(model)
        if other != self:
            raise ValueError(
                f"these settings were tuned for {self}, but this model is {other}; run `autoprune tune` on "
                "it, or use the settings as they are: dataclasses.replace(method)"
            )

    def __str__(self) -> str:
        named = f"{self.name!r}, " if self.name else ""
        return (
            f"{named}{self.architecture} with {self.layers} layers of {self.hidden_size}, "
            f"{self.vocabulary} words, fingerprint {self.fingerprint}"
        )


@dataclass(frozen=True)
class TunedFile:
    """What the file holds.

    settings: every option of the method beside the budget, as JSON has it. judged: agreement with the
    unpruned model on prompts that were not tuned on. prompts: how many were used for what.
    version: of the library that wrote it.
    """

    method: str
    budget: Budget
    settings: Mapping[str, Any]
    model: ModelIdentity
    judged: Mapping[str, Any]
    prompts: Mapping[str, Any]
    version: str

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        record = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "autoprune": self.version,
            "model": dataclasses.asdict(self.model),
            "budget": dataclasses.asdict(self.budget),
            "method": self.method,
            "settings": dict(self.settings),
            "judged": dict(self.judged),
            "prompts": dict(self.prompts),
        }
        write_whole(path, json.dumps(record, indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> TunedFile:
        """The content of a file.

        Raises:
            ValueError: there is no such file, it is damaged, or of another format; the message says which.
        """
        path = Path(path)
        record = _record(path)
        for name, kind in _FIELDS.items():
            if not isinstance(record.get(name), kind):
                raise _damaged(path, f"{name} is {record.get(name)!r}")
        try:
            return cls(
                record["method"],
                Budget(**record["budget"]),
                record["settings"],
                ModelIdentity(**record["model"]),
                record["judged"],
                record["prompts"],
                record["autoprune"],
            )
        except (TypeError, ValueError) as error:
            raise _damaged(path, str(error)) from error


def settings_of(method: Any) -> dict[str, Any]:
    """Every option of a method beside its budget, for JSON."""
    names = [option.name for option in dataclasses.fields(method) if option.name != "budget"]
    return {name: _as_json(getattr(method, name)) for name in names}


def _as_json(value: Any) -> Any:
    """A setting: a fleet by its rule, as its state is one process's; a summary token as text."""
    if isinstance(value, Fleet):
        return {"rule": value.rule_as_dict()}
    return str(value) if isinstance(value, SummaryToken) else value


def as_setting(value: Any) -> Any:
    """A setting of a method, from what JSON has of it.

    Raises:
        ValueError: it was a fleet's rule and is damaged.
    """
    if isinstance(value, dict):
        return Fleet(rule_from_dict(value.get("rule")))
    # JSON has no tuples.
    return tuple(value) if isinstance(value, list) else value


def is_tuned_file(name: str) -> bool:
    """Whether what is given as a method's name is a file of settings."""
    return name.endswith(".json")


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"cannot read the tuned settings {str(path)!r} ({error.strerror}); `autoprune tune` writes them"
        ) from error
    except ValueError as error:
        raise _damaged(path, f"it is no JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(
            f"{str(path)!r} holds no tuned settings; give the tuned.json that `autoprune tune` wrote"
        )
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{str(path)!r} has format {record.get('format_version')!r} of autoprune "
            f"{record.get('autoprune')}, and this release reads {FORMAT_VERSION}; tune again, or install "
            "the release that wrote it"
        )
    return record


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"the tuned settings {str(path)!r} are damaged: {reason}; run `autoprune tune` again"
    )

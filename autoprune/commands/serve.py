"""`autoprune serve`: an OpenAI server that prunes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UnsupportedError
from ..loading import Loaded, load_embedded, load_model
from ..methods import list_methods
from ..methods.base import Method
from .inputs import build_method, parse_budget

ENGINES, RAY_DEVICES = ("local", "ray"), ("auto", "cpu", "cuda")
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


@dataclass(frozen=True)
class ServeRequest:
    """What to serve, and where.

    methods: those that requests may choose from, the default first.
    all_methods: of them, leave out those that the model cannot take.
    options: of `serving.service.Options`.
    engine: "local" has the model in this process; "ray" in so many processes as there are `replicas`.
    """

    methods: Mapping[str, Method]
    all_methods: bool = False
    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    grace: int = 30
    options: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    engine: str = "local"
    replicas: int | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {self.engine!r}")
        if self.engine == "local":
            if self.replicas is not None:
                raise ValueError(
                    "--replicas are for --engine ray; the local engine is a single one"
                )
            return
        if self.options.get("conversations"):
            raise ValueError(
                "--conversations need --engine local: a further question may reach another replica, "
                "which has not kept the answer"
            )
        if self.device not in RAY_DEVICES:
            raise ValueError(
                f"Ray chooses the GPU of each replica, so --device must be one of {', '.join(RAY_DEVICES)}, "
                f"got {self.device!r}"
            )


def check_installed() -> None:
    """Raise ImportError unless the extra is there."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"autoprune serve needs {', '.join(missing)}: pip install 'autoprune[serve]'"
        )


def methods_of(
    method: str, budget: str | None, settings: Sequence[str], allowed: Sequence[str]
) -> dict[str, Method]:
    """The methods that requests may choose from, the default first.

    Args:
        budget, settings: of the default method; the budget is the others', too, where it is one of tokens or
            a share.
        allowed: further names; "all" stands for every method (`fitting` leaves out what the model cannot take).

    Raises:
        ValueError: there is no such method, or a setting or budget cannot be right.
    """
    asked = None if budget is None else parse_budget(budget)
    default = build_method(method, asked, {}, settings)
    if default.budget.over != "prompt":
        raise ValueError(
            f"{default.budget.expression} is shared by the prompts of a batch, and requests of a batch have "
            "nothing to do with each other; give --budget an amount for each request"
        )
    methods = {default.name: default}
    for name in list_methods() if "all" in allowed else allowed:
        if name in methods:
            continue
        try:
            methods[name] = build_method(name, asked, {}, [])
        except ValueError:
            # Some have no budgets of this kind.
            if "all" not in allowed:
                raise
    return methods


def fitting(methods: Mapping[str, Method], model: Any) -> dict[str, Method]:
    """The methods that can prune this model, in their order."""
    fit = {}
    for name, method in methods.items():
        try:
            method(model)
        except (ValueError, UnsupportedError):
            continue
        fit[name] = method
    return fit


def serve(request: ServeRequest) -> None:
    """Load the model and answer requests until the process is told to end.

    Raises:
        ImportError: the extra `serve` is not installed, or Ray where it is wanted.
        ValueError: bad input; see `load_model`.
        UnsupportedError: a model that cannot be pruned, or not by one of the methods.
    """
    check_installed()
    from ..serving.limits import Limits
    from ..serving.replicas import on_ray
    from ..serving.server import serve as run
    from ..serving.service import Options, Service

    options = Options(limits=Limits(**request.limits), **request.options)
    where = (request.host, request.port, request.grace)
    if request.engine == "local":
        loaded = _load(request, request.device)
        run(Service(loaded, _methods(request, loaded), options), *where)
        return
    with on_ray(request.replicas or 1, request.device) as replicas:
        # What only asks for shapes comes first: it knows whether all is right with the model.
        loaded = _load(request, replicas.device, weights=False)
        service = Service(loaded, _methods(request, loaded), options, replicas)
        replicas.load(request.model, request.dtype, options.limits.batch_size, options.window)
        run(service, *where)


def _load(request: ServeRequest, device: str, weights: bool = True) -> Loaded:
    if request.model is None:
        return load_embedded(device, request.dtype, weights)
    return load_model(request.model, device, request.dtype, weights)


def _methods(request: ServeRequest, loaded: Loaded) -> Mapping[str, Method]:
    if not request.all_methods:
        return request.methods
    default = next(iter(request.methods))
    return {default: request.methods[default], **fitting(request.methods, loaded.model)}

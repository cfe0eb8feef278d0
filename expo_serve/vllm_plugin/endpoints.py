"""Additions to vLLM's API server: the routes, the alpha header, the API key guard, the metrics."""

from __future__ import annotations

import json
import os
import time
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import psutil
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expo_serve import keys
from expo_serve.config import ExpoConfig, deployment_id, parse_alpha, parse_config
from expo_serve.errors import LoadError
from expo_serve.metrics import DeploymentGauges
from expo_serve.report import DeploymentReport, LoadReport, PublicSource, combined_effective_alpha
from expo_serve.state.shared import SharedState
from expo_serve.vllm_plugin import compat, sweeping
from expo_serve.vllm_plugin.draining import DrainMiddleware, Gate
from expo_serve.vllm_plugin.engines import call_ranks
from expo_serve.vllm_plugin.model_list import show_models
from expo_serve.vllm_plugin.rank_state import failures_reported
from expo_serve.vllm_plugin.worker import LOAD_METHOD, REPORT_METHOD

HEADER = "X-Expo-Alpha"
OPEN_ROUTES = frozenset({"/health", "/ping", "/version", "/metrics", "/metrics/"})
"""Routes that need no API key, for probes and scraping."""
POLICY_VIOLATION = 1008  # RFC 6455, section 7.4.1


@dataclass
class Served:
    """What the server serves; only a sweep, which has a server of its own, changes it."""

    config: ExpoConfig
    is_loading: bool = False
    """Whether another alpha is being loaded, so that nothing can be answered."""


class ExpoEndpointPlugin:
    """Implements vLLM's endpoint plugin protocol (``vllm.plugins.endpoint_plugins.interface``).

    Does nothing on a server with another load format.
    """

    name = "expo"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes and the middlewares; vLLM's own authentication runs before them.

        Raises:
            UsageError: an API key is empty, or no request can send it.
        """
        args: Namespace = app.state.args
        config = _deployed(args)
        if config is None:
            return
        app.state.expo_gate = gate = Gate(SharedState.find())
        app.state.expo_served = served = Served(config)
        app.add_api_route("/v1/expo", _show, methods=["GET"], response_model=None)
        app.add_api_route("/v1/models", show_models, methods=["GET"], response_model=None)  # in the place of vLLM's
        app.add_middleware(DrainMiddleware, gate=gate)
        app.add_middleware(AlphaMiddleware, served=served)
        if required := keys.required_keys(args.api_key, os.environ):
            # vLLM's own guard, which reads them from here later, compares with a header that was decoded as latin-1.
            args.api_key = [keys.as_in_header(key) for key in required]
            app.add_middleware(GuardMiddleware, tokens=args.api_key)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Collect the reports of all ranks once and publish them."""
        config = _deployed(args)
        if config is None or engine_client is None:
            return
        gate: Gate = state.expo_gate
        names = list(args.served_model_name or [args.model])
        with failures_reported(gate.reporter):
            report = await _report(engine_client, config, names)
        gauges = DeploymentGauges()
        gauges.set(report)
        state.expo_report = report
        gate.reporter.update(names=names)
        gate.watch(engine_client, state)
        if sweeping.channel is not None:
            sweeping.listen(sweeping.channel, _AlphaSwitch(engine_client, state, gauges))


class _AlphaSwitch:
    """Loads another alpha into the engines of a sweep's server, in place."""

    def __init__(self, engine_client: Any, state: Any, gauges: DeploymentGauges) -> None:
        self._engines, self._state, self._gauges = engine_client, state, gauges

    async def __call__(self, alpha: float) -> DeploymentReport:
        """Load an alpha and return the report; until then every request is answered with 503.

        Raises:
            Exception: the weights could not be loaded; the server answers nothing any more.
        """
        served: Served = self._state.expo_served
        before: DeploymentReport = self._state.expo_report
        served.is_loading = True
        await call_ranks(self._engines, LOAD_METHOD, alpha)
        await _empty_caches(self._engines)
        served.config = served.config.model_copy(update={"alpha": alpha})
        report = await _report(self._engines, served.config, before.served_model_names)
        report = report.model_copy(update={"startup_seconds": before.startup_seconds})
        self._gauges.set(report)
        self._state.expo_report = report
        served.is_loading = False
        return report


async def _empty_caches(engine_client: Any) -> None:
    """Empty the caches of what the former weights computed.

    Raises:
        LoadError: the prefix cache could not be emptied, since requests are still running.
    """
    await engine_client.reset_mm_cache()
    await engine_client.reset_encoder_cache()
    if not await engine_client.reset_prefix_cache():
        raise LoadError("the prefix cache could not be emptied after another alpha was loaded: requests are running")


async def _report(engine_client: Any, config: ExpoConfig, names: list[str]) -> DeploymentReport:
    """Ask all ranks for their reports.

    Raises:
        LoadError: they have not loaded the same sources, or not this alpha.
    """
    ranks = await _collect(engine_client)
    _refuse_different_sources(ranks, config)
    if other := next((rank for rank in ranks if rank.alpha != config.alpha), None):
        raise LoadError(f"rank {other.rank} of engine {other.engine} has alpha {other.alpha}, not {config.alpha}")
    model = engine_client.vllm_config.model_config
    return DeploymentReport(
        alpha=config.alpha,
        alpha_rules=[rule.text for rule in config.alpha_rules],
        allowed=list(config.allow),
        rounding=config.rounding,
        rounding_seed=config.rounding_seed,
        effective_alpha=combined_effective_alpha(config.alpha, ranks),
        deployment_id=deployment_id(config, model.model, model.revision),
        served_model_names=names,
        sources=ranks[0].sources,
        dtype=str(model.dtype).removeprefix("torch."),
        ranks=ranks,
        startup_seconds=_since_start(config),
    )


async def _show(request: Request) -> Response:
    report: DeploymentReport = request.app.state.expo_report
    return Response(report.model_dump_json(), media_type="application/json")


def _deployed(args: Namespace) -> ExpoConfig | None:
    if args.load_format != "expo":
        return None
    extra = args.model_loader_extra_config
    return parse_config(json.loads(extra) if isinstance(extra, str) else extra, "--model-loader-extra-config")


def _since_start(config: ExpoConfig) -> float:
    """Return the seconds since the command started or, under plain vLLM, since this process started.

    CLOCK_MONOTONIC is the same clock in all processes of a machine.
    """
    if config.pinned and config.pinned.started is not None:
        return time.monotonic() - config.pinned.started
    return time.time() - psutil.Process().create_time()


async def _collect(engine_client: Any) -> list[LoadReport]:
    """Return the reports of all ranks."""
    reports = [
        LoadReport.model_validate_json(answer).model_copy(update={"engine": engine})
        for engine, ranks in (await call_ranks(engine_client, REPORT_METHOD)).items()
        for answer in ranks
        if answer is not None
    ]
    if not reports:
        raise LoadError("no worker has a load report: another loader loaded the weights")
    return sorted(reports, key=lambda report: (report.engine, report.rank))


def _refuse_different_sources(ranks: list[LoadReport], config: ExpoConfig) -> None:
    """Require all ranks to have loaded one version of each source: under plain vLLM each finds its own.

    Raises:
        LoadError: they have not, and the configuration does not allow it.
    """
    if "different-revisions" in config.allow:
        return
    for side, first in ranks[0].sources.items():
        for rank in ranks:
            if (found := rank.sources[side]) != first:
                raise LoadError(
                    f"{side} differs between the ranks: {_version(first)} on rank {ranks[0].rank}, "
                    f"{_version(found)} on rank {rank.rank} of engine {rank.engine}; give every machine the same "
                    f"files, or pin {side}_revision to a commit (if this is meant: --allow different-revisions)"
                )


def _version(source: PublicSource) -> str:
    return f"{source.name} {source.revision or ''}".strip() + f" (fingerprint {source.fingerprint})"


class AlphaMiddleware:
    """Adds the alpha header to every response, and answers 412 to a request that asks for another alpha.

    Not 409: OpenAI's client retries it, and a retry cannot help.
    """

    def __init__(self, app: ASGIApp, served: Served) -> None:
        self.app = app
        self.served = served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if self.served.is_loading and scope.get("path") not in OPEN_ROUTES:
            await _refuse(scope, receive, send, 503, {"error": {"message": "another alpha is being loaded"}})
            return
        wanted = Headers(scope=scope).getlist(HEADER)
        if not all(self._is_served(value) for value in wanted):
            await _refuse(scope, receive, self._labelled(send), 412, self._mismatch(wanted))
            return
        await self.app(scope, receive, self._labelled(send))

    def _is_served(self, value: str) -> bool:
        try:
            return parse_alpha(value) == self.served.config.alpha
        except ValueError:
            return False

    def _mismatch(self, wanted: list[str]) -> dict[str, Any]:
        served = self.served.config.alpha_text
        message = f"{HEADER} asks for alpha {', '.join(wanted)}, but this server's alpha is {served}"
        kind = {"type": "invalid_request_error", "param": HEADER, "code": "alpha_mismatch"}
        return {"error": {"message": message, **kind}}

    def _labelled(self, send: Send) -> Send:
        text = self.served.config.alpha_text

        async def labelled(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                headers = MutableHeaders(scope=message)
                headers[HEADER] = text
                headers.append("Access-Control-Expose-Headers", HEADER)
            await send(message)

        return labelled


class GuardMiddleware:
    """Requires the API key on every route that is not open; vLLM itself guards only a few prefixes.

    The path comes from the ASGI scope, never from a URL that a Host header can change. Keys are compared in constant
    time (CWE-208).

    Args:
        app: what is guarded.
        tokens: the keys, in the form of :func:`expo_serve.keys.as_in_header`.
    """

    def __init__(self, app: ASGIApp, tokens: Iterable[str]) -> None:
        self.app = app
        self._vllm = compat.AuthenticationMiddleware(app, list(tokens))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] in ("http", "websocket") and scope.get("method") != "OPTIONS"
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if guarded and path not in OPEN_ROUTES and not self._vllm.verify_token(Headers(scope=scope)):
            await _refuse(scope, receive, send, 401, {"error": "Unauthorized"})
            return
        await self.app(scope, receive, send)


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, body: dict[str, Any]) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": POLICY_VIOLATION})
    else:
        await JSONResponse(body, status_code=status)(scope, receive, send)

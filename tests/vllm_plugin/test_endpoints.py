"""What our endpoint plugin adds to vLLM's app, without vLLM: ``test_server`` asks the same of the real server."""

from __future__ import annotations

import asyncio
import os
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from expo_serve.errors import UsageError
from expo_serve.report import DeploymentReport
from expo_serve.vllm_plugin.endpoints import HEADER, OPEN_ROUTES, ExpoEndpointPlugin
from tests.docs.pages import page

KEY = {"Authorization": "Bearer key"}
CORS: dict[str, Any] = {
    "allowed_origins": ["*"],
    "allow_credentials": False,
    "allowed_methods": ["*"],
    "allowed_headers": ["*"],
    "enable_request_id_headers": False,
    "middleware": [],
}


def made_by_vllm(api_key: list[str] | None) -> FastAPI:
    """An app with our additions, then vLLM's own middlewares, in the order of vLLM's ``build_app``."""
    from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware

    app = FastAPI()
    extra = {"base": "b", "aligned": "a", "alpha": 0.5}
    app.state.args = Namespace(load_format="expo", model_loader_extra_config=extra, api_key=api_key, **CORS)
    ExpoEndpointPlugin().attach_router(app)
    init_entrypoints_middleware(app.state.args, app, ())
    return app


@pytest.fixture
def client() -> TestClient:
    return TestClient(made_by_vllm(["key"]))


KEYS = {
    "plain": b"key",
    "spaces within": b"one two",
    "UTF-8": "clé-鍵".encode(),
    "latin-1": "clé".encode("latin-1"),
    "any bytes": bytes(range(0x80, 0x100)),
}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("is_flag", [True, False])
@pytest.mark.parametrize("path", ["/v1/no-such-route", "/no-such-route"])
def test_keys_are_compared_byte_by_byte(monkeypatch: pytest.MonkeyPatch, key: bytes, is_flag: bool, path: str) -> None:
    """By vLLM's own guard of ``/v1`` too, which stands before ours."""
    if not is_flag:
        monkeypatch.setitem(os.environb, b"VLLM_API_KEY", key)
    app = made_by_vllm([os.fsdecode(key), "another"] if is_flag else None)

    def status(*authorizations: bytes) -> int:
        return asyncio.run(_status(app, path, [(b"Authorization", value) for value in authorizations]))

    assert status(b"Bearer " + key) == status(b"bearer " + key) == 404
    double = key.decode("latin-1").encode()
    for wrong in (b"", b"Bearer", b"Bearer ", key, b"Basic " + key, b"Bearer " + key + b"x", b"Bearer " + key[:-1]):
        assert status(wrong) == 401, wrong
    assert status(b"Bearer " + double) == (404 if double == key else 401)
    assert status(b"Bearer \xff\x00\xfe") == status(b"\xe9\xff") == 401
    assert status() == 401
    assert status(b"Bearer wrong", b"Bearer " + key) == 401


async def _status(app: FastAPI, path: str, headers: list[tuple[bytes, bytes]]) -> int:
    """Ask with these very bytes, which starlette's client would encode anew."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
        return (await client.get(path, headers=headers)).status_code


@pytest.mark.parametrize("path", sorted(OPEN_ROUTES))
def test_open_routes_take_any_key(path: str) -> None:
    assert asyncio.run(_status(made_by_vllm(["key"]), path, [(b"Authorization", b"Bearer \xff")])) == 404


@pytest.mark.parametrize(("api_key", "variable"), [([""], "good"), ([None], "good"), (None, ""), (None, " \n")])
def test_no_server_is_left_open_by_an_empty_key(
    monkeypatch: pytest.MonkeyPatch, api_key: list[Any] | None, variable: str
) -> None:
    """Under plain vLLM too, whose command does not ask."""
    monkeypatch.setenv("VLLM_API_KEY", variable)
    with pytest.raises(UsageError, match="is empty, so every route would be open"):
        made_by_vllm(api_key)


def test_without_a_key_every_route_is_open() -> None:
    assert TestClient(made_by_vllm(None)).get("/v1/no-such-route").status_code == 404


@pytest.mark.parametrize("is_loaded", [True, False])
def test_models_show_names_in_the_place_of_paths(client: TestClient, is_loaded: bool) -> None:
    from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList

    served = ModelCard(id="served", root="/models/a", max_model_len=64)
    adapter = ModelCard(id="adapter", root="/adapters/x", parent="served")

    async def show_available_models() -> ModelList:
        return ModelList(data=[served, adapter])

    state = client.app.state  # type: ignore[attr-defined]
    state.openai_serving_models = SimpleNamespace(show_available_models=show_available_models)
    if is_loaded:
        state.expo_report = DeploymentReport.model_validate_json(page("observability.md").code("json")[0])
    answer = client.get("/v1/models", headers=KEY)
    assert answer.headers[HEADER] == "0.5"
    name = state.expo_report.sources["aligned"].name if is_loaded else "served"
    expected = [{**served.model_dump(), "root": name}, {**adapter.model_dump(), "root": "adapter"}]
    assert answer.json() == {"object": "list", "data": expected}


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_no_method_of_the_route_changes_alpha(client: TestClient, method: str) -> None:
    assert client.request(method, "/v1/expo", json={"alpha": 1}).status_code == 401
    response = client.request(method, "/v1/expo", json={"alpha": 1}, headers=KEY)
    assert response.status_code == 405
    assert response.headers[HEADER] == "0.5"


@pytest.mark.parametrize(("asked", "code"), [("0.5", 404), ("5e-1", 404), ("0.51", 412), ("half", 412)])
def test_another_alpha_is_refused_before_the_route_is_looked_for(client: TestClient, asked: str, code: int) -> None:
    response = client.get("/no-such-route", headers={**KEY, HEADER: asked})
    assert response.status_code == code
    assert response.headers[HEADER] == "0.5"


def test_a_server_with_another_loader_stays_as_it_is() -> None:
    app = FastAPI()
    before = list(app.routes)
    app.state.args = Namespace(load_format="auto", model_loader_extra_config={}, api_key=["key"])
    ExpoEndpointPlugin().attach_router(app)
    assert list(app.routes) == before
    assert TestClient(app).get("/v1/expo").status_code == 404

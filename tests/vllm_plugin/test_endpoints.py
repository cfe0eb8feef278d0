"""What our endpoint plugin adds to vLLM's app, without vLLM: ``test_server`` asks the same of the real server."""

from __future__ import annotations

from argparse import Namespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from expo_serve.vllm_plugin.endpoints import HEADER, ExpoEndpointPlugin

KEY = {"Authorization": "Bearer key"}


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    extra = {"base": "b", "aligned": "a", "alpha": 0.5}
    app.state.args = Namespace(load_format="expo", model_loader_extra_config=extra, api_key=["key"])
    ExpoEndpointPlugin().attach_router(app)
    return TestClient(app)


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

"""A real client against the real server: names, answers, the alpha header, the key, the report, the metrics."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from expo_serve.report import DeploymentReport
from tests.conftest import API_KEY
from tests.server import Server

pytestmark = pytest.mark.engine
HEADER = "X-Expo-Alpha"


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.api_key, max_retries=2) as client:
        yield client


def test_models_are_the_served_names(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["first", "second"]


def test_chat_and_completion(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="second",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=16,
    )
    assert chat.choices[0].message.content
    completion = client.completions.create(model="first", prompt="One, two,", temperature=0, max_tokens=4)
    assert completion.choices[0].text


def test_streaming(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="first", prompt="One, two,", max_tokens=8, stream=True))
    assert len(chunks) > 4


def test_wrong_model_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="no-such-model", prompt="x", max_tokens=1)


@pytest.mark.parametrize("text", ["0.5", "0.50", "+.5", "5e-1"])
def test_the_served_alpha_is_accepted_as_a_number(server: Server, text: str) -> None:
    response = server.get("/v1/models", **{HEADER: text})
    assert response.status_code == 200
    assert response.headers[HEADER] == "0.5"
    assert HEADER in response.headers["Access-Control-Expose-Headers"]


@pytest.mark.parametrize("text", ["0.51", "0", "-0.5", "nan", "half", ""])
def test_another_alpha_is_refused_once(server: Server, text: str) -> None:
    sent: list[object] = []
    counting = openai.DefaultHttpxClient(event_hooks={"request": [sent.append]})
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.api_key, max_retries=2, http_client=counting)
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="first", prompt="x", max_tokens=1, extra_headers={HEADER: text})
    assert caught.value.status_code == 412
    assert caught.value.type == "invalid_request_error"
    assert caught.value.code == "alpha_mismatch"
    assert len(sent) == 1


@pytest.mark.parametrize("path", ["/v1/expo", "/v1/models", "//v1/models", "/docs", "/load", "/no-such-route"])
def test_routes_that_want_the_key(server: Server, path: str) -> None:
    assert httpx.get(f"{server.url}{path}").status_code == 401
    assert httpx.get(f"{server.url}{path}", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert HEADER not in httpx.get(f"{server.url}{path}").headers


@pytest.mark.parametrize("path", ["/invocations", "/tokenize", "/detokenize", "/v1/completions", "/score"])
def test_posts_that_want_the_key(server: Server, path: str) -> None:
    assert httpx.post(f"{server.url}{path}", json={"prompt": "x"}).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/metrics"])
def test_open_routes(server: Server, path: str) -> None:
    response = httpx.get(f"{server.url}{path}", follow_redirects=True)
    assert response.status_code == 200
    assert response.headers[HEADER] == "0.5"


def test_a_shaped_host_opens_nothing(server: Server) -> None:
    response = httpx.get(f"{server.url}/v1/models", headers={"Host": "x/health?"})
    assert response.status_code in (400, 401)


def test_errors_carry_the_alpha(server: Server) -> None:
    response = server.get("/no-such-route")
    assert response.status_code == 404
    assert response.headers[HEADER] == "0.5"


def test_report(server: Server) -> None:
    response = server.get("/v1/expo")
    report = DeploymentReport.model_validate_json(response.text)
    assert '"alpha":0.5' in response.text
    assert report.served_model_names == ["first", "second"]
    assert report.dtype == "bfloat16"
    assert {side: source.name for side, source in report.sources.items()} == {"base": "base", "aligned": "aligned"}
    (rank,) = report.ranks
    assert (rank.engine, rank.rank) == (0, 0)
    assert rank.tensors == {"extrapolated": 272, "materialized": 0, "copied": 0}
    assert rank.read_bytes["base"] == rank.read_bytes["aligned"] == rank.weight_bytes
    assert rank.peak_host_memory_bytes > rank.weight_bytes
    assert 0.9 < rank.anonymous_memory_growth_bytes / rank.weight_bytes < 1.3
    assert 0 < rank.phase_seconds["weights"] < rank.total_seconds < report.startup_seconds
    assert math.isclose(sum(rank.phase_seconds.values()), rank.total_seconds)


def test_models_name_the_source_as_their_root(client: openai.OpenAI) -> None:
    assert [model.to_dict()["root"] for model in client.models.list()] == ["aligned", "aligned"]


def test_no_route_shows_a_path(server: Server, demo_pair: tuple[Path, Path]) -> None:
    """Neither those that vLLM lists with the parameters left out, nor an error."""
    routes = server.get("/openapi.json").json()["paths"]
    gets = {path for path, methods in routes.items() if "get" in methods} | {"/metrics", "/docs", "/openapi.json"}
    assert {"/v1/models", "/v1/expo", "/version", "/load"} <= gets
    texts = {path: server.get(path).text for path in gets}
    texts |= {f"POST {path}": server.post(path, {}).text for path, methods in routes.items() if "post" in methods}
    texts["other model"] = server.post("/v1/completions", {"model": "x", "prompt": "x"}).text
    shown = {path for path, text in texts.items() if str(demo_pair[0].parent) in text or str(server.log.parent) in text}
    assert shown == set()


@pytest.mark.parametrize(("path", "answer_to_the_key"), [("/v1/models", 200), ("/tokenize", 405)])
@pytest.mark.parametrize("key", [API_KEY.encode(), API_KEY[:-1].encode(), b"", b"\xe9\xff", "cl\u00e9".encode()])
def test_any_bytes_of_a_key_are_answered(server: Server, path: str, answer_to_the_key: int, key: bytes) -> None:
    expected = answer_to_the_key if key == API_KEY.encode() else 401
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        start = f"GET {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n".encode()
        connection.sendall(start + b"Authorization: Bearer " + key + b"\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert answer.startswith(f"HTTP/1.1 {expected} ".encode()), answer


def test_metrics_say_what_the_report_says(server: Server) -> None:
    report = DeploymentReport.model_validate_json(server.get("/v1/expo").text)
    samples: dict[tuple[Any, ...], float] = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(server.get("/metrics").text)
        for sample in family.samples
        if sample.name.startswith("expo_")
    }
    rank = report.ranks[0]
    ours = (("engine", "0"), ("rank", "0"))
    expected: dict[tuple[Any, ...], float] = {
        ("expo_alpha", ("model_name", "first")): 0.5,
        ("expo_alpha", ("model_name", "second")): 0.5,
        ("expo_startup_duration_seconds",): report.startup_seconds,
        ("expo_effective_alpha", *ours): rank.effective_alpha or 0.0,
        ("expo_load_total_duration_seconds", *ours): rank.total_seconds,
        ("expo_load_weight_bytes", *ours): rank.weight_bytes,
        ("expo_load_peak_host_memory_bytes", *ours): rank.peak_host_memory_bytes,
        ("expo_load_anonymous_memory_growth_bytes", *ours): rank.anonymous_memory_growth_bytes,
    }
    for phase, seconds in rank.phase_seconds.items():
        expected["expo_load_phase_duration_seconds", ours[0], ("phase", phase), ours[1]] = seconds
    for side, size in rank.read_bytes.items():
        expected["expo_load_read_bytes", *ours, ("source", side)] = size
    for kind, count in rank.tensors.items():
        expected["expo_load_tensors", ours[0], ("kind", kind), ours[1]] = count
    info = {key: value for key, value in samples.items() if key[0] == "expo_deployment_info"}
    assert {key: value for key, value in samples.items() if key not in info} == expected
    assert set(info.values()) == {1.0}
    assert {dict(key[1:])["model_name"] for key in info} == {"first", "second"}
    assert {dict(key[1:])["rounding"] for key in info} == {"dithered"}


def test_report_says_how_it_was_rounded_and_what_arrived(server: Server) -> None:
    report = DeploymentReport.model_validate_json(server.get("/v1/expo").text)
    assert (report.rounding, report.rounding_seed, len(report.deployment_id)) == ("dithered", 0, 16)
    assert report.effective_alpha == pytest.approx(0.5, rel=0.05)
    assert report.ranks[0].effective_alphas["0.5"].standard_error < 0.02


def test_there_is_no_route_that_changes_alpha(server: Server) -> None:
    assert server.post("/v1/expo", {"alpha": 1}).status_code == 405
    for method in ("PUT", "PATCH", "DELETE"):
        assert server.request(method, "/v1/expo", {"alpha": 1}).status_code == 405, method
    assert server.get("/v1/expo").json()["alpha"] == 0.5


def test_without_a_compiler_it_runs_eagerly_and_says_so(server: Server) -> None:
    lines = [line for line in server.text().splitlines() if line.startswith("expo-serve: warning:")]
    assert len(lines) == 1
    assert "no C++ compiler (no-such-compiler)" in lines[0]
    assert "--enforce-eager" in lines[0]


def test_the_log_has_one_line_about_the_load_and_no_key(server: Server) -> None:
    assert server.text().count("expo: loaded with alpha 0.5 in ") == 1
    assert str(server.api_key) not in server.text()

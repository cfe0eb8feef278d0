"""Every word of the rendered command lines is one that the commands know, and says what the values say."""

from __future__ import annotations

import argparse
import functools
from argparse import Namespace
from typing import Any

import pytest

from expo_serve.cli import options, probe, running, serve
from expo_serve.cli.options import Options, read_options
from tests.deploy.chart import Object, load, names, pick, pod_templates, render

LWS = {"$(LWS_WORKER_INDEX)": "1", "$(LWS_LEADER_ADDRESS)": "leader"}
"""What the LeaderWorkerSet's controller puts in place."""


def _servers(name: str) -> dict[str, Object]:
    """Containers that run the server, by their pod's name and place."""
    return {
        f"{one['metadata']['name']} {place}": template["spec"]["containers"][0]
        for one in render(load(name))
        for place, template in pod_templates(one).items()
        if one["kind"] in ("Deployment", "LeaderWorkerSet") and "args" in template["spec"]["containers"][0]
    }


def _arguments(container: Object) -> list[str]:
    arguments: list[str] = container["args"]
    for word, value in LWS.items():
        arguments = [argument.replace(word, value) for argument in arguments]
    assert not any("$(" in argument for argument in arguments)
    return arguments


def _read(arguments: list[str]) -> Options:
    return read_options(serve.parser(), arguments)


@pytest.mark.parametrize("name", [name for name in names() if name != "none"])
def test_our_flags_say_what_the_values_say(name: str) -> None:
    """Read by the command's own parser, which refuses what it would refuse in the pod."""
    servers = _servers(name)
    assert servers
    for place, container in servers.items():
        given = _read(_arguments(container))
        annotations = _template(name, place)["metadata"]["annotations"]
        status = [port["containerPort"] for port in container.get("ports", []) if port["name"] == "status"]
        assert running.read_running(given).status_port == next(iter(status), None), place
        assert f"{given.config.alpha:g}" == f"{float(annotations['expo-serve/alpha']):g}", place
        assert not any(
            word.startswith(tuple(f"--{flag}" for flag in ("base", "aligned", "alpha"))) for word in given.unknown
        )


def _template(name: str, place: str) -> Object:
    wanted, _, where = place.partition(" ")
    for one in render(load(name)):
        if one["metadata"]["name"] == wanted and where in pod_templates(one):
            return pod_templates(one)[where]
    raise AssertionError(place)


def test_all_of_our_flags_are_used() -> None:
    """What the command has and the chart does not set is left out on purpose."""
    used = {word.split("=")[0] for name in names() for one in _servers(name).values() for word in one["args"]}
    parser = argparse.ArgumentParser(add_help=False)
    running.add_running_flags(parser)
    ours = {f"--{flag}" for flag in options._SOURCE_FLAGS} | parser._option_string_actions.keys()
    assert ours <= used


@pytest.mark.parametrize("name", ["one", "three", "cpu", "everything"])
def test_probes_are_calls_that_the_command_takes(name: str) -> None:
    objects = render(load(name))
    for one in objects:
        for place, template in pod_templates(one).items():
            container = template["spec"]["containers"][0]
            if one["kind"] == "Job" or place == "workerTemplate":
                continue
            command = container["command"] if one["kind"] == "Pod" else container["readinessProbe"]["exec"]["command"]
            assert command[:2] == ["expo-serve", "probe"]
            given = probe._read(command[2:])
            assert given.completion == (one["kind"] == "Pod")
            assert given.state == (one["kind"] != "Pod")
            variant = one["metadata"]["name"].removesuffix("-test").removesuffix("-nodes")
            servers = {key.split()[0].removesuffix("-nodes"): server for key, server in _servers(name).items()}
            words = servers[variant]["args"]
            assert given.served_model_name == words[words.index("--served-model-name") + 1]
            assert f"--alpha={given.alpha}" in words
            service = pick([other for other in objects if other["metadata"]["name"] == variant], "Service")
            host = f"{variant}.models.svc" if one["kind"] == "Pod" else "127.0.0.1"
            ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
            assert given.url == f"http://{host}:{ports['status' if given.state else 'http']}"


@functools.cache
def _vllm() -> tuple[Any, Any]:
    """vLLM's parser, and that of its command `serve`."""
    from expo_serve.vllm_plugin import compat

    parser = compat.FlexibleArgumentParser(prog="vllm")
    return parser, compat.ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))


def _parse(arguments: list[str]) -> Namespace:
    """As vLLM parses what is not ours; no flag may be an abbreviation."""
    parser, serve = _vllm()
    for word in arguments:
        flag = word.split("=")[0]
        assert not flag.startswith("--") or flag in serve._option_string_actions, f"vLLM has no {flag}"
    try:
        parsed: Namespace = parser.parse_args(["serve", "/models/aligned", *arguments])
    except SystemExit:
        raise AssertionError(f"vLLM refuses {arguments}") from None
    return parsed


@pytest.mark.engine
@pytest.mark.parametrize("name", [name for name in names() if name != "none"])
def test_all_other_flags_are_vllms(name: str) -> None:
    for place, container in _servers(name).items():
        parsed = _parse(_read(_arguments(container)).unknown)
        assert parsed.shutdown_timeout > 0, place
        ports = [port["containerPort"] for port in container.get("ports", []) if port["name"] == "http"]
        assert ports in ([parsed.port], [])
        assert bool(ports) != place.endswith("workerTemplate")


@pytest.mark.engine
def test_sizes_and_names_reach_vllm() -> None:
    big = _parse(_read(_arguments(_servers("gpu")["demo-expo-serve-big template"])).unknown)
    assert (big.tensor_parallel_size, big.pipeline_parallel_size, big.max_model_len) == (4, 2, 8192)
    assert big.served_model_name == ["assistant-strong", "assistant"]
    assert big.shutdown_timeout == 600
    for place, rank in (("leaderTemplate", 0), ("workerTemplate", 1)):
        wide = _parse(_read(_arguments(_servers("nodes-mp")[f"demo-expo-serve-wide-nodes {place}"])).unknown)
        assert (wide.nnodes, wide.node_rank, wide.headless) == (2, rank, place == "workerTemplate")
        assert wide.master_addr == "leader"
    ray = _parse(_read(_arguments(_servers("nodes-ray")["demo-expo-serve-wide-nodes leaderTemplate"])).unknown)
    assert ray.distributed_executor_backend == "ray"
    mild = _parse(_read(_arguments(_servers("routed")["demo-expo-serve-mild template"])).unknown)
    assert mild.served_model_name == ["aligned-expo-0.3", "assistant"]


@pytest.mark.engine
def test_a_flag_that_vllm_does_not_have_is_found() -> None:
    with pytest.raises(AssertionError, match="no --tensor-parallel-sizes"):
        _parse(["--tensor-parallel-sizes=2"])

"""The image, and two variants of the demo's pair that run from it; each is made once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from loadtests.results import RESULTS, save
from tests.deploy.chart import Object, Values, render
from tests.deploy.kube.podman import DOCKER, Podman, bring, bring_podman
from tests.deploy.kube.pods import Pod, playing, secret
from tests.server import run_command

KEY = "a-key-for-tests"
SECRET = "expo-key"
READY_SECONDS = 300
ALPHAS = {"strong": "0.5", "weak": "-0.5"}

Figures = dict[str, Any]


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Podman:
    """Set up for this machine."""
    bring_podman()
    return Podman(tmp_path_factory.mktemp("podman"))


@pytest.fixture(scope="session")
def image(podman: Podman) -> str:
    """Built of this tree, unless it was before; how long each step took is kept if there was none at all."""
    name = "localhost/expo-serve:" + run_command("--version").stdout.split()[-1]
    before = podman.image_id(name) is not None
    seconds: dict[str, float] = {}
    (base,) = (line[9:] for line in (DOCKER / "Dockerfile").read_text().splitlines() if line.startswith("ARG BASE="))
    with ThreadPoolExecutor() as pool:
        wheels = pool.submit(podman.script, "wheels.sh")
        if not podman.image_id(base) and not podman.pull(base):
            bring("mmdebstrap")
            seconds["stand_in_for_base"] = podman.script("base_image.sh")
        seconds["wheels_meanwhile"] = wheels.result()
    seconds["build"] = podman.script("build.sh")
    if not before:  # else most of it came from the last build's cache
        save("kube", "image", {"seconds": seconds, "bytes": int(podman.ask("{{.Size}}", name))}, RESULTS)
    return name


@pytest.fixture(scope="session")
def figures() -> Figures:
    """What is measured on the way, for the result file."""
    return {"ready_seconds": {}}


@pytest.fixture(scope="session")
def release(image: str, demo_pair: tuple[Path, Path]) -> Values:
    """The values of a release of the demo's pair on CPU, without variants."""
    base, aligned = demo_pair
    inspect = ["inspect", "--base", str(base), "--aligned", str(aligned), "--alpha", "0", "--json"]
    weight_bytes = json.loads(run_command(*inspect).stdout)["memory"]["weight_bytes"]
    repository, tag = image.split(":")
    return {
        "defaults": {
            "device": "cpu",
            "base": f"/models/{base.name}",
            "aligned": f"/models/{aligned.name}",
            "memory": {"weightBytes": weight_bytes, "kvCacheGiB": 1},
            "extraArgs": ["--enforce-eager", "--max-model-len=1024"],
        },
        "image": {"repository": repository, "tag": tag},
        "weights": {"volume": {"hostPath": str(base.parent)}},
        "apiKey": {"existingSecret": SECRET},
    }


@pytest.fixture(scope="session")
def deployments(release: Values) -> list[Object]:
    """Of the two variants, as rendered."""
    variants = {name: {"alpha": alpha} for name, alpha in ALPHAS.items()}
    return [one for one in render(release | {"variants": variants}) if one["kind"] == "Deployment"]


@pytest.fixture(scope="session")
def pods(
    podman: Podman, deployments: list[Object], figures: Figures, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Pod]]:
    """Both, ready by their own probes; by variant."""
    folder = tmp_path_factory.mktemp("pods")
    started = time.monotonic()
    with secret(podman, folder, SECRET, **{"api-key": KEY}), playing(podman, deployments, folder) as running:
        by_variant = {pod.variant: pod for pod in running}
        for variant, pod in by_variant.items():
            pod.wait_ready(READY_SECONDS)
            figures["ready_seconds"][variant] = time.monotonic() - started
        yield by_variant


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only where they are asked for, by `-m kube`: they build an image and need root."""
    if "kube" in config.getoption("markexpr"):
        return
    left_out = [item for item in items if item.get_closest_marker("kube")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]

"""Rendered Deployments as podman runs them, and the parts of a kubelet that podman does not have."""

from __future__ import annotations

import base64
import copy
import functools
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import yaml

from tests.deploy.chart import Object
from tests.deploy.kube.podman import Podman

_POLL_SECONDS = 1.0


class Pod:
    """The one pod of a Deployment that podman runs."""

    def __init__(self, podman: Podman, deployment: Object) -> None:
        self.podman = podman
        template = deployment["spec"]["template"]
        self.variant: str = template["metadata"]["labels"]["expo-serve/variant"]
        self.spec: Object = template["spec"]
        (self.container,) = self.spec["containers"]
        self.name = f"{deployment['metadata']['name']}-pod{podman.pod_suffix}"
        self.server = f"{self.name}-{self.container['name']}"
        self.memory = Memory(self)

    @functools.cached_property
    def address(self) -> str:
        """The pod's own, as a Service would send to it."""
        infra = self.podman.run("pod", "inspect", "--format", "{{.InfraContainerID}}", self.name).stdout.strip()
        return self.podman.ask("{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", infra)

    def port(self, name: str) -> int:
        """The number of one of its ports."""
        (number,) = (port["containerPort"] for port in self.container["ports"] if port["name"] == name)
        return int(number)

    @property
    def url(self) -> str:
        """The server's root."""
        return f"http://{self.address}:{self.port('http')}"

    @functools.cached_property
    def pid(self) -> int:
        """Of its first process, as this machine counts."""
        return int(self.podman.ask("{{.State.Pid}}", self.server))

    def family(self) -> list[int]:
        """All its processes."""
        first = psutil.Process(self.pid)
        return [one.pid for one in [first, *first.children(recursive=True)]]

    def probe(self, kind: str) -> bool:
        """One look by the rendered probe, as the kubelet looks."""
        probe = self.container[f"{kind}Probe"]
        if "exec" in probe:
            return self.execute(*probe["exec"]["command"])[0] == 0
        url = f"http://{self.address}:{self.port(probe['httpGet']['port'])}{probe['httpGet']['path']}"
        try:
            return httpx.get(url, timeout=probe["timeoutSeconds"]).is_success
        except httpx.TransportError:
            return False

    def state(self) -> Object:
        """What its status port says."""
        answer = httpx.get(f"http://{self.address}:{self.port('status')}/state", timeout=10)
        state: Object = answer.raise_for_status().json()
        return state

    def wait_ready(self, timeout: float) -> None:
        """Until the startup probe has passed, then the other two."""
        deadline = time.monotonic() + timeout
        for kind in ("startup", "liveness", "readiness"):
            while not self.probe(kind):
                state = self.podman.ask("{{.State.Status}}", self.server)
                assert state == "running", f"{self.server} is {state}:\n{self.log()}"
                assert time.monotonic() < deadline, f"{self.server}: no {kind} after {timeout} s:\n{self.log()}"
                time.sleep(_POLL_SECONDS)

    def execute(self, *command: str) -> tuple[int, str]:
        """Run a command in the server's container: exit code and output."""
        done = self.podman.run("exec", self.server, *command, check=False)
        return done.returncode, done.stdout + done.stderr

    def log(self, lines: int = 60) -> str:
        """What the server printed last."""
        done = self.podman.run("logs", "--tail", str(lines), self.server, check=False)
        return done.stdout + done.stderr


class Memory(threading.Thread):
    """The most memory that a pod's processes had at once: shared pages counted once (PSS), looked at every second."""

    def __init__(self, pod: Pod) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._pod = pod
        self._ended = threading.Event()

    def run(self) -> None:
        """Look until told to stop."""
        first = psutil.Process(self._pod.pid)
        while not self._ended.wait(1.0):
            try:
                family = [first.pid, *(child.pid for child in first.children(recursive=True))]
            except psutil.NoSuchProcess:
                return
            self.peak_bytes = max(self.peak_bytes, sum(_pss(pid) for pid in family))

    def stop(self) -> int:
        """No more looks; the peak."""
        self._ended.set()
        self.join()
        return self.peak_bytes


def _pss(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it has just ended
        return 0
    return 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))


@contextmanager
def secret(podman: Podman, folder: Path, name: str, **values: str) -> Iterator[None]:
    """A Secret that pods may name. Podman 4.3 stores a played one in a form that its own secretKeyRef does not read."""
    data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    whole = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data}
    file = folder / "secret"
    file.write_text(json.dumps(data if podman.is_old else whole))
    podman.run("secret", "rm", name, check=False)
    podman.run("secret", "create", name, str(file))
    try:
        yield
    finally:
        podman.run("secret", "rm", name, check=False)


@contextmanager
def playing(podman: Podman, deployments: list[Object], folder: Path) -> Iterator[list[Pod]]:
    """Run Deployments with ``podman kube play``; in the end all of it is gone, and logs lie in the folder."""
    pods = [Pod(podman, one) for one in deployments]
    shared = Path(tempfile.mkdtemp(prefix="expo-kube-", dir="/dev/shm"))
    file = folder / "objects.yaml"
    file.write_text(yaml.safe_dump_all([_for_podman(one, folder, shared) for one in deployments]))

    def remove() -> None:
        podman.run("pod", "rm", "--force", "--ignore", "--time", "0", *(pod.name for pod in pods))

    try:
        remove()  # what an aborted run left
        podman.run("kube", "play", str(file))
        for pod in pods:
            pod.memory.start()
        yield pods
    finally:
        for pod in pods:
            (folder / f"{pod.name}.log").write_text(pod.log(lines=100000))
        remove()
        shutil.rmtree(shared)


def _for_podman(one: Object, folder: Path, shared: Path) -> Object:
    """The object as podman 4.3 can run it.

    - It makes volumes of emptyDirs, named like the volume alone and so shared by all pods, with the mode of the image's
      folder of that path, and forgets a medium. Here they are folders that anybody may write: what the kubelet makes.
    - It listens at each container's port on this machine too, where two pods have the same one.
    - It makes a health check with curl, which the image lacks, of the liveness probe.
    """
    one = copy.deepcopy(one)
    spec = one["spec"]["template"]["spec"]
    for container in spec["containers"]:
        for key in ("ports", "livenessProbe"):
            del container[key]
    for volume in spec["volumes"]:
        if (options := volume.pop("emptyDir", None)) is None:
            continue
        root = shared if options.get("medium") == "Memory" else folder
        path = root / one["metadata"]["name"] / volume["name"]
        path.mkdir(parents=True)
        path.chmod(0o777)
        volume["hostPath"] = {"path": str(path), "type": "Directory"}
    return one

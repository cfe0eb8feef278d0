"""Serve a real pair with expo-serve, ask it through the openai package, and show what it did.

Two servers, one after the other: the aligned model as it is (alpha 0), and extrapolated.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from openai import OpenAI

QUESTIONS = ("What should I know about planting a tree?", "How can I get better at making soup?")
MAX_TOKENS = 80
ADAPTER = Path(__file__).parent / "adapter"
START_SECONDS = 300
# The demo is one user on a small machine: a small cache, and no minutes spent on compiling.
FLAGS = ("--enforce-eager", "--max-model-len", "1024")
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


class DemoError(Exception):
    """Something went wrong, said in one line."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    log: Path

    def text(self, path: str) -> str:
        """The body of a GET."""
        return httpx.get(f"{self.url}{path}", timeout=30).raise_for_status().text


def free_port() -> int:
    """A TCP port that nobody listens on just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


@contextmanager
def running(models: Path, alpha: str, other: list[str]) -> Iterator[Server]:
    """Start expo-serve, wait until it is ready, stop it in the end. ``other``: flags for what stands beside base."""
    port = free_port()
    log = models / f"server-alpha-{alpha}.log"
    command = [str(Path(sys.executable).with_name("expo-serve")), "--base", str(models / "base")]
    command += [*other, "--alpha", alpha, *FLAGS, "--port", str(port)]
    print(f"$ {' '.join(['expo-serve', *command[1:]])}", flush=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **ENVIRONMENT})
    try:
        server = Server(f"http://127.0.0.1:{port}", log)
        wait_ready(server, process)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    if code != 0:
        raise DemoError(f"the server ended with code {code}; its log is {log}")


def wait_ready(server: Server, process: "subprocess.Popen[bytes]") -> None:
    """Wait until /health answers."""
    started = time.monotonic()
    while time.monotonic() - started < START_SECONDS:
        if process.poll() is not None:
            last = (server.log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
            raise DemoError(f"the server ended while starting: {last}")
        try:
            server.text("/health")
        except httpx.HTTPError:
            time.sleep(0.5)
        else:
            print(f"ready after {time.monotonic() - started:.0f} s\n", flush=True)
            return
    raise DemoError(f"the server was not ready after {START_SECONDS} s; its log is {server.log}")


def ask(server: Server, question: str) -> str:
    """One greedy answer, plain."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=MAX_TOKENS,
    )
    return answer.choices[0].message.content or ""


def ask_streamed(server: Server, question: str) -> str:
    """The same, as it comes."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    chunks = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=MAX_TOKENS,
        stream=True,
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def show_answers(plain: list[str], extrapolated: list[str], alpha: str) -> None:
    """The answers of both servers beside each other."""
    for question, before, after in zip(QUESTIONS, plain, extrapolated, strict=True):
        print(f"### {question}\n--- alpha 0 (aligned itself)\n{before}\n--- alpha {alpha}\n{after}\n")


def other_side(models: Path, kind: str) -> list[str]:
    """The flags for the aligned checkpoint, or for what leads to it: an adapter, or a packed delta, made once."""
    if kind == "lora":
        return ["--delta", str(ADAPTER)]
    if kind != "packed":
        return ["--aligned", str(models / "aligned")]
    delta = models / "packed"
    if delta.is_dir() and delta.stat().st_mtime < (models / "aligned").stat().st_mtime:
        shutil.rmtree(delta)  # of a pair that was there before
    if not delta.is_dir():
        command = [str(Path(sys.executable).with_name("expo-serve")), "delta", "create", "--base", str(models / "base")]
        command += ["--aligned", str(models / "aligned"), "--out", str(delta)]
        print(f"$ {' '.join(['expo-serve', *command[1:]])}", flush=True)
        if code := subprocess.run(command, check=False).returncode:
            raise DemoError(f"the delta could not be made (code {code})")
    return ["--delta", str(delta)]


def show_effective_alpha(models: Path, other: list[str], alphas: list[str]) -> None:
    """What arrives of each alpha in bfloat16, under both roundings: `expo-serve inspect --measure`."""
    print("### What arrives of alpha in bfloat16 (expo-serve inspect --measure)")
    print(f"{'alpha':>8}{'dithered':>12}{'nearest':>12}")
    for alpha in alphas:
        command = [str(Path(sys.executable).with_name("expo-serve")), "inspect", "--base", str(models / "base"), *other]
        command += ["--alpha", alpha, "--measure", "--json"]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE)
        if done.returncode:
            raise DemoError(f"the pair could not be measured (code {done.returncode})")
        found = json.loads(done.stdout)["measurement"]["effective_alpha"]
        print(f"{alpha:>8}{found['dithered']:>12.4f}{found['nearest']:>12.4f}", flush=True)
    print()


def run(models: Path, alpha: str, kind: str) -> None:
    """Ask both servers and show the answers, the report and the metrics."""
    other = other_side(models, kind)
    with running(models, "0", other) as server:
        plain = [ask(server, question) for question in QUESTIONS]
    with running(models, alpha, other) as server:
        extrapolated = [ask(server, QUESTIONS[0]), *(ask_streamed(server, question) for question in QUESTIONS[1:])]
        report = server.text("/v1/expo")
        metrics = [line for line in server.text("/metrics").splitlines() if line.startswith("expo_")]
    show_answers(plain, extrapolated, alpha)
    show_effective_alpha(models, other, sorted({"0.1", "0.3", alpha}, key=float))
    print("### GET /v1/expo", json.dumps(json.loads(report), indent=2), sep="\n", end="\n\n")
    print("### GET /metrics (those of expo-serve)", *metrics, sep="\n")


def main() -> None:
    """Run the demo; exits 0 when all went well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path(".demo"), help="where prepare.py put the models")
    parser.add_argument("--alpha", default="0.5")
    parser.add_argument(
        "--delta", choices=("", "lora", "packed"), default="", help="in place of the aligned checkpoint"
    )
    options = parser.parse_args()
    try:
        run(options.models, options.alpha, options.delta)
    except (DemoError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""The environment of the engines that run inside the test process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest

from tests.conformance.running import many_engines

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else this process stays on one core
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module")
def engines() -> Iterator[None]:
    """This process may run many engines. vLLM sets further variables by itself: none of them outlives the module."""
    with mock.patch.dict(os.environ, ENVIRONMENT), many_engines():
        yield

"""Methods that expo-serve adds to vLLM's worker, for the front end to call."""

from __future__ import annotations

import time
from typing import Any

REPORT_METHOD = "expo_load_report"
LOAD_METHOD = "expo_load_alpha"
ALIVE_METHOD = "expo_is_alive"
EXTENSION = "expo_serve.vllm_plugin.worker.ExpoWorkerExtension"


class ExpoWorkerExtension:
    """Mixin for vLLM's worker class, named by ``--worker-extension-cls``."""

    get_model: Any  # a method of vLLM's worker

    def expo_load_report(self) -> str | None:
        """Return the :class:`LoadReport` of this rank as JSON; None if another loader loaded the model."""
        from expo_serve.vllm_plugin.loader import REPORT_ATTRIBUTE

        report = getattr(self.get_model(), REPORT_ATTRIBUTE, None)
        return report.model_dump_json() if report else None

    def expo_is_alive(self) -> bool:
        """Answer, and note when in the command's shared memory: of a hung engine, that tells which ranks live."""
        from expo_serve.vllm_plugin.rank_state import rank_reporter

        rank_reporter().update(alive=time.monotonic())
        return True

    def expo_load_alpha(self, alpha: float) -> str:
        """Load the weights of another alpha and return the :class:`LoadReport` of this rank as JSON.

        No route of the server calls it: only a sweep does, whose server is its own.

        Args:
            alpha: the extrapolation factor.

        Raises:
            ExpoError: the weights could not be loaded; what the worker holds now is undefined.
        """
        from expo_serve.vllm_plugin.reloading import load_alpha

        return load_alpha(self, alpha).model_dump_json()

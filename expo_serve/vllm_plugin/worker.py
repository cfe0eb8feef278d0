"""Methods that expo-serve adds to vLLM's worker, for the front end to call."""

from __future__ import annotations

from typing import Any

REPORT_METHOD = "expo_load_report"
EXTENSION = "expo_serve.vllm_plugin.worker.ExpoWorkerExtension"


class ExpoWorkerExtension:
    """Mixin for vLLM's worker class, named by ``--worker-extension-cls``."""

    get_model: Any  # a method of vLLM's worker

    def expo_load_report(self) -> str | None:
        """Return the :class:`LoadReport` of this rank as JSON; None if another loader loaded the model."""
        from expo_serve.vllm_plugin.loader import REPORT_ATTRIBUTE

        report = getattr(self.get_model(), REPORT_ATTRIBUTE, None)
        return report.model_dump_json() if report else None

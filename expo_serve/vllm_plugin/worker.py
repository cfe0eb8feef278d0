"""What a vLLM worker answers to the front end."""

from __future__ import annotations

from typing import Any

REPORT_METHOD = "expo_load_report"
EXTENSION = "expo_serve.vllm_plugin.worker.ExpoWorkerExtension"


class ExpoWorkerExtension:
    """Mixed into vLLM's worker class by ``--worker-extension-cls``."""

    get_model: Any  # the worker's own

    def expo_load_report(self) -> str | None:
        """This rank's LoadReport as JSON; None when another loader loaded the model."""
        from expo_serve.vllm_plugin.loader import REPORT_ATTRIBUTE

        report = getattr(self.get_model(), REPORT_ATTRIBUTE, None)
        return report.model_dump_json() if report else None

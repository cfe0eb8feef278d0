"""Methods that expo-serve adds to vLLM's worker, for the front end to call."""

from __future__ import annotations

from typing import Any

REPORT_METHOD = "expo_load_report"
LOAD_METHOD = "expo_load_alpha"
EXTENSION = "expo_serve.vllm_plugin.worker.ExpoWorkerExtension"


class ExpoWorkerExtension:
    """Mixin for vLLM's worker class, named by ``--worker-extension-cls``."""

    get_model: Any  # a method of vLLM's worker, as is update_config
    update_config: Any
    vllm_config: Any
    model_runner: Any

    def expo_load_report(self) -> str | None:
        """Return the :class:`LoadReport` of this rank as JSON; None if another loader loaded the model."""
        from expo_serve.vllm_plugin.loader import REPORT_ATTRIBUTE

        report = getattr(self.get_model(), REPORT_ATTRIBUTE, None)
        return report.model_dump_json() if report else None

    def expo_load_alpha(self, alpha: float) -> str:
        """Load the weights of another alpha in place, and return the :class:`LoadReport` of this rank as JSON.

        No route of the server calls it: only a sweep does, whose server is its own.

        Args:
            alpha: the extrapolation factor.

        Raises:
            ExpoError: the weights could not be loaded; what the model holds now is undefined.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import get_model_loader

        extra = {**self.vllm_config.load_config.model_loader_extra_config, "alpha": alpha}
        self.update_config({"load_config": {"model_loader_extra_config": extra}})
        config = self.vllm_config
        with set_current_vllm_config(config):
            report = get_model_loader(config.load_config).reload(
                self.get_model(), config.model_config, self.model_runner.reload_weights
            )
        return str(report.model_dump_json())

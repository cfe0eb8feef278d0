"""expo-serve: serve extrapolated (ExPO) models with vLLM.

The public names are imported when they are first used, so that ``import expo_serve`` itself stays light.
"""

from typing import TYPE_CHECKING

from expo_serve.version import __version__

if TYPE_CHECKING:
    from expo_serve.checkpoint.source import HubAccess
    from expo_serve.config import AlphaRule, ExpoConfig, Source
    from expo_serve.errors import (
        CheckpointError,
        CompatError,
        ConfigError,
        ExpoError,
        LoadError,
        PairError,
        ServeError,
        SourceError,
        UsageError,
        ValuesError,
    )
    from expo_serve.plan.plan import Plan, PlannedTensor
    from expo_serve.plan.prepare import prepare
    from expo_serve.report import DeploymentReport, LoadReport
    from expo_serve.sweep.api import sweep_alphas
    from expo_serve.sweep.results import SweepResult

__all__ = [
    "AlphaRule",
    "CheckpointError",
    "CompatError",
    "ConfigError",
    "DeploymentReport",
    "ExpoConfig",
    "ExpoError",
    "HubAccess",
    "LoadError",
    "LoadReport",
    "PairError",
    "Plan",
    "PlannedTensor",
    "ServeError",
    "Source",
    "SourceError",
    "SweepResult",
    "UsageError",
    "ValuesError",
    "__version__",
    "prepare",
    "sweep_alphas",
]


if not TYPE_CHECKING:  # or a misspelt name would pass as an object

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from expo_serve import config, errors, report
        from expo_serve.checkpoint import source
        from expo_serve.plan import plan
        from expo_serve.plan import prepare as preparation

        if name in ("SweepResult", "sweep_alphas"):
            from expo_serve.sweep import api

            return getattr(api, name)
        module = next(module for module in (errors, config, report, source, plan, preparation) if hasattr(module, name))
        return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

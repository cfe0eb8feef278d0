"""Another alpha in a running worker: loaded so that the weights are those of a fresh load, or not at all."""

from __future__ import annotations

import gc
from typing import Any

from expo_serve.errors import LoadError, count_of
from expo_serve.report import LoadReport
from expo_serve.vllm_plugin import compat

_CACHES = frozenset({"kv_cache", "_k_scale_cache", "_v_scale_cache"})
"""Attributes of a layer, or of its ``impl``, that vLLM sets anew when it binds the KV cache."""
_OF_MODULES = frozenset({"_modules", "_parameters", "_buffers"})

Attributes = dict[str, Any]


def load_alpha(worker: Any, alpha: float) -> LoadReport:
    """Load the weights of another alpha into a worker, and return the report.

    On the CPU vLLM computes with packed copies of matrices, and its ``reload_weights`` leaves some of them as they were
    (tied embeddings, experts, heads of reward models), so the model is made anew there. On a GPU captured graphs refer
    to the parameters; there ``reload_weights`` writes into them.

    Args:
        worker: vLLM's, with a model that this load format has loaded.
        alpha: the extrapolation factor.

    Raises:
        ExpoError: the weights could not be loaded; what the worker holds now is undefined.
    """
    from expo_serve.vllm_plugin.loader import REPORT_ATTRIBUTE, ExpoModelLoader

    extra = {**worker.vllm_config.load_config.model_loader_extra_config, "alpha": alpha}
    worker.update_config({"load_config": {"model_loader_extra_config": extra}})
    if compat.current_platform.is_cpu():
        make_anew(worker)
        report: LoadReport = getattr(worker.get_model(), REPORT_ATTRIBUTE)
        return report
    config = worker.vllm_config
    with compat.set_current_vllm_config(config):
        loader = ExpoModelLoader(config.load_config)
        return loader.reload(worker.get_model(), config.model_config, worker.model_runner.reload_weights)


def make_anew(worker: Any) -> None:
    """Let a worker load its model as when it started, and hand the KV cache over to the new layers.

    Nothing may be captured or compiled: that would go on with the old model.

    Args:
        worker: vLLM's.

    Raises:
        ExpoError: the model could not be loaded; the worker has none then.
    """
    compilation = worker.vllm_config.compilation_config
    layers: dict[str, Any] = compilation.static_forward_context
    before = {name: _bound(layer) for name, layer in layers.items()}
    layers.clear()
    compilation.static_all_moe_layers.clear()
    worker.model_runner.model = None  # or there would be two of them in memory
    gc.collect()
    worker.load_model()
    if differing := sorted(before.keys() ^ layers.keys()):
        raise LoadError(f"{count_of(len(differing), 'layer')} of the model differ from one load to the next", differing)
    for name, layer in layers.items():
        _bind(layer, before[name])


def _bound(layer: Any) -> tuple[Attributes, ...]:
    """Return the attributes of a layer with a KV cache, and of its ``impl``; nothing of other layers.

    Experts are among those; what they refer to must not be kept while the model is loaded again.
    """
    if not hasattr(layer, "kv_cache"):
        return ()
    return tuple({key: value for key, value in vars(one).items() if key not in _OF_MODULES} for one in _owners(layer))


def _bind(layer: Any, before: tuple[Attributes, ...]) -> None:
    """Give a new layer the former one's cache, and what backends have added to the former one after it was loaded."""
    for one, attributes in zip(_owners(layer), before, strict=False):
        for key, value in attributes.items():
            if key in _CACHES or key not in vars(one):
                setattr(one, key, value)


def _owners(layer: Any) -> list[Any]:
    impl = getattr(layer, "impl", None)
    return [layer] if impl is None else [layer, impl]

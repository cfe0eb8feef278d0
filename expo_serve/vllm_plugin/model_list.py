"""``GET /v1/models`` without local paths, which vLLM shows to every client as ``root``."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from expo_serve.report import DeploymentReport


async def show_models(request: Request) -> Response:
    """Answer as vLLM does, with a name as each ``root``: that of the source, or that of an adapter itself.

    The source's name is a hub id or the last part of a folder, so that ``vllm bench serve``, which takes the tokenizer
    from ``root`` unless it is told another, still finds that of a hub id.
    """
    state = request.app.state
    listed = (await state.openai_serving_models.show_available_models()).model_dump()
    source = _source_name(getattr(state, "expo_report", None))
    for model in listed["data"]:
        is_adapter = model["parent"] is not None
        model["root"] = model["id"] if is_adapter or source is None else source
    return JSONResponse(listed)


def _source_name(report: DeploymentReport | None) -> str | None:
    """Return the name of aligned, or of the delta in its place; None where nothing was loaded."""
    if report is None:
        return None
    source = report.sources.get("aligned") or report.sources.get("delta")
    return source.name if source else None

"""Where the engine under test answers: an OpenAI-compatible address, pinned to one alpha."""

from __future__ import annotations

from dataclasses import dataclass

ALPHA_HEADER = "X-Expo-Alpha"


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server."""

    url: str
    """With ``/v1``, for example ``http://127.0.0.1:8000/v1``."""
    model: str
    """Served name."""
    key: str | None = None
    """API key; None where there is none."""
    alpha: str | None = None
    """Canonical form of the alpha that each request is pinned to: the server answers 412 to another."""
    tokenizer: str | None = None
    """Folder of the tokenizer."""

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of every request."""
        authorization = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return {**authorization, **({ALPHA_HEADER: self.alpha} if self.alpha is not None else {})}

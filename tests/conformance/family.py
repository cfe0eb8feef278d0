"""One line of the table: an architecture, and what its tiny checkpoint needs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """One architecture, or one layout of it.

    Args:
        architecture: its name in vLLM's registry.
        sizes: what its config has besides or instead of the standard sizes (:func:`~tests.conformance.tiny.shrink`).
        layout: tells two layouts of one architecture apart.
        like: the class of transformers that writes its checkpoints, if not the one of the same name.
        config: the class of vLLM that reads its config, where transformers has none.
        hub_names: where the hub's files name a tensor otherwise than this transformers writes it: regex to name.
        transposed: names (a regex) of what the hub's files hold transposed.
        engine: engine arguments that it needs.
        multimodal: the weights are checked with its towers, the tokens without them.
        materialized: how many of its tensors are made real before they are copied, since the model computes with them.
        unfilled: parameters that vLLM's own code leaves without values.
        not_run: why no tokens are generated; without a reason both engines must give the same ones.
    """

    architecture: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    layout: str = ""
    like: str = ""
    config: str = ""
    hub_names: Mapping[str, str] = field(default_factory=dict)
    transposed: str = ""
    engine: Mapping[str, Any] = field(default_factory=dict)
    multimodal: bool = False
    materialized: int = 0
    unfilled: tuple[str, ...] = ()
    not_run: str = ""

    @property
    def name(self) -> str:
        """Names the test."""
        return f"{self.architecture}-{self.layout}" if self.layout else self.architecture

    def hub_name(self, name: str) -> str:
        """What the hub's files call a tensor."""
        for pattern, replacement in self.hub_names.items():
            name = re.sub(pattern, replacement, name)
        return name

"""Settings of low-rank adapters, as they stand under `lora:` in a recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LoraConfig:
    """Which linear maps and experts get an adapter (models/lora.py), and how large. Only adapters learn then."""

    rank: int = 16
    alpha: float = 32.0
    """The product B A counts alpha / rank times."""
    rslora: bool = False
    """It counts alpha / sqrt(rank) times instead (arXiv:2312.03732)."""
    targets: list[str] = field(
        default_factory=lambda: ["thinker.model.layers.*.self_attn.*", "thinker.model.layers.*.mlp.experts.*"]
    )
    """Patterns of linear maps, by the released name of their module, and of fused experts,
    NAME.mlp.experts.gate_up_proj and down_proj. By default the language model's attention and experts."""
    adapter: str | None = None
    """A folder of an adapter in peft's format to go on from. Its rank, alpha and targets take the place of these."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be above 0, not {self.alpha}")
        if not self.targets:
            raise ValueError("targets is empty: name what gets an adapter")

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

"""Learning rate by samples seen."""

from __future__ import annotations

import math


def learning_rate(seen: float, warmup: float, total: float, peak: float, floor: float) -> float:
    """Linear warm-up from 0 to `peak` over `warmup`, then half a cosine down to `floor` at `total`.

    `seen`, `warmup` and `total` are samples within the phase; `seen` includes the batch about to be stepped.
    """
    if seen < warmup:
        return peak * seen / warmup
    progress = min(1.0, (seen - warmup) / max(1.0, total - warmup))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))

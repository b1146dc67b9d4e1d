"""What a scaling study measured, for a plan: MFU and links, of the fit.json of tools/scaling.py."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_model import Link


@dataclass(frozen=True)
class Measured:
    device: str
    mfu: float | None
    """While computing; None: the study does not know the peak of its device."""
    inside: Link | None
    between: Link | None
    """None where the study measured no such link."""


def read_fit(path: str) -> Measured:
    """Raises ValueError that names the file and what is wrong with it."""
    option = f"--fit {path}"
    try:
        told = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{option}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{option}: is no JSON; expected the fit.json of a study of tools/scaling.py") from error
    if isinstance(told, dict) and told.get("points") == 0:
        raise ValueError(f"{option}: no point of this study was measured, so nothing was fitted")
    try:
        links = {name: _link(told["fit"][name]) for name in ("inside", "between")}
        found = Measured(str(told["device"]), _positive(told["mfu"]), **links)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{option}: is not the fit.json of a study of tools/scaling.py") from error
    if found.mfu is None and found.inside is None and found.between is None:
        raise ValueError(f"{option}: has neither an MFU nor a link; a plan takes nothing else from a study")
    return found


def _link(told: Any) -> Link | None:
    bandwidth, latency = _positive(told["bytes_per_s"]), float(told["latency_s"])
    if not (latency >= 0 and math.isfinite(latency)):
        raise ValueError
    return None if bandwidth is None else Link(latency, bandwidth)


def _positive(value: Any) -> float | None:
    if value is None:
        return None
    if not (float(value) > 0 and math.isfinite(value)):
        raise ValueError
    return float(value)

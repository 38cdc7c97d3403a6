"""NVIDIA's Multi-Process Service, whose variables limit a client."""

from __future__ import annotations

from tfenv.launchers.base import Launcher

LAUNCHER = Launcher("MPS", is_scheduler=False)

"""Simulated GPUs: real TensorFlow on stub driver libraries that write down each request."""

from __future__ import annotations

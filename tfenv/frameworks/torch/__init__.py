"""PyTorch, and with it Keras on the PyTorch backend."""

from tfenv.frameworks.torch.framework import FRAMEWORK

__all__ = ["FRAMEWORK"]

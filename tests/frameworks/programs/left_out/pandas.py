"""Stands in front of a package that TensorFlow imports if it is installed. See `harness.World.alone`."""

raise ModuleNotFoundError(f"No module named {__name__!r}", name=__name__)

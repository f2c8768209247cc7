"""Locate-then-edit model editing as Lightning training."""

__version__ = "0.1.0"

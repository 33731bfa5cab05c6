"""The version of raylm."""

__version__ = "0.1.0"

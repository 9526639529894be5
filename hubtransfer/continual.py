"""The short name of ``hubtransfer.methods.continual``: ``from hubtransfer.continual import ...`` works."""

from hubtransfer.methods.continual import __dir__, __getattr__  # noqa: F401

"""Continual learning: tasks come one after another, and what was learned is to stay."""

from hubtransfer.methods.registry import lazy_family

__getattr__, __dir__ = lazy_family(__name__)

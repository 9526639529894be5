"""Methods: which losses train which parameters in which order.

The package is also a function, because that is the shortest way to ask what there is: `hubtransfer.methods()`
returns one row for every registered method.
"""

import sys
from types import ModuleType

from hubtransfer.methods.aggregate import Aggregator, Combine, GramAggregator, Sum
from hubtransfer.methods.method import Method
from hubtransfer.methods.registry import MethodInfo, find, rows
from hubtransfer.methods.stage import OptimizerConfig, Stage
from hubtransfer.methods.update import Accumulate, Descend, Terms, Unrolled, Update

__all__ = [
    "Accumulate",
    "Aggregator",
    "Combine",
    "Descend",
    "GramAggregator",
    "Method",
    "MethodInfo",
    "OptimizerConfig",
    "Stage",
    "Sum",
    "Terms",
    "Unrolled",
    "Update",
    "find",
    "rows",
]


class _CallableModule(ModuleType):
    def __call__(self) -> list[MethodInfo]:
        return rows()


sys.modules[__name__].__class__ = _CallableModule

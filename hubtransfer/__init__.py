"""hubtransfer: adapt any backbone to a new task, train it through Accelerate, share it on the Hub.

Every public name is imported when it is first used, so that ``import hubtransfer`` stays a matter of milliseconds:

    >>> import hubtransfer as ht
    >>> ht.TransferModel.__module__
    'hubtransfer.models.model'

Families of methods are found by their folder, not listed here: ``ht.distillation.KD``, ``ht.adaptation.DANN``;
``ht.methods()`` gives one row for every method there is.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hubtransfer.backbones import Backbone as Backbone, Features as Features
    from hubtransfer.data import (
        Augment as Augment,
        Batch as Batch,
        ClassBalanced as ClassBalanced,
        DataStream as DataStream,
        DomainPair as DomainPair,
        GradientBased as GradientBased,
        Hardest as Hardest,
        Herding as Herding,
        Mixing as Mixing,
        MixUp as MixUp,
        MultiTask as MultiTask,
        Reservoir as Reservoir,
        Ring as Ring,
        SingleTask as SingleTask,
        TaskStream as TaskStream,
        blurred_stream as blurred_stream,
        domain_tasks as domain_tasks,
        load_data as load_data,
        noised_tasks as noised_tasks,
        permuted_tasks as permuted_tasks,
        rotated_tasks as rotated_tasks,
        split_tasks as split_tasks,
    )
    from hubtransfer.methods import Method as Method, OptimizerConfig as OptimizerConfig
    from hubtransfer.methods.finetuning import FineTune as FineTune
    from hubtransfer.models import (
        ClassificationHead as ClassificationHead,
        DenseHead as DenseHead,
        MultiLabelHead as MultiLabelHead,
        NearestMeanHead as NearestMeanHead,
        PatchStore as PatchStore,
        RegressionHead as RegressionHead,
        RidgeHead as RidgeHead,
        Teacher as Teacher,
        TransferModel as TransferModel,
        initialise_from_teacher as initialise_from_teacher,
        stitched_model as stitched_model,
    )
    from hubtransfer.models.generators import VAE as VAE, WGANGP as WGANGP
    from hubtransfer.patches import (
        DeepenConfig as DeepenConfig,
        DepthwiseConfig as DepthwiseConfig,
        ScaleBiasConfig as ScaleBiasConfig,
        SplitConfig as SplitConfig,
        WidenConfig as WidenConfig,
    )
    from hubtransfer.training import Trainer as Trainer, TrainingArguments as TrainingArguments


__version__ = "0.1.0"

# The same names as above, for the interpreter (tests/test_import.py holds the two together).
_HOME = {
    "hubtransfer.backbones": "Backbone Features",
    "hubtransfer.data": "Augment Batch ClassBalanced DataStream DomainPair GradientBased Hardest Herding "
    "Mixing MixUp MultiTask Reservoir Ring SingleTask TaskStream blurred_stream domain_tasks load_data noised_tasks "
    "permuted_tasks rotated_tasks split_tasks",
    "hubtransfer.methods": "Method OptimizerConfig",
    "hubtransfer.methods.finetuning": "FineTune",
    "hubtransfer.models": "ClassificationHead DenseHead MultiLabelHead NearestMeanHead PatchStore RegressionHead "
    "RidgeHead Teacher TransferModel initialise_from_teacher stitched_model",
    "hubtransfer.models.generators": "VAE WGANGP",
    "hubtransfer.patches": "DeepenConfig DepthwiseConfig ScaleBiasConfig SplitConfig WidenConfig",
    "hubtransfer.training": "Trainer TrainingArguments",
}
_WHERE = {name: module for module, names in _HOME.items() for name in names.split()}
_PACKAGES = ("backbones", "config", "data", "evaluation", "functional", "methods", "models", "patches", "training")

__all__ = ["__version__", *sorted(_WHERE)]


def _families() -> list[str]:
    """The families of methods: the folders under methods/."""
    folder = Path(__file__).parent / "methods"
    return sorted(p.parent.name for p in folder.glob("*/__init__.py"))


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
    elif name in _PACKAGES:
        value = importlib.import_module(f"hubtransfer.{name}")
    elif not name.startswith("_") and name in _families():
        value = importlib.import_module(f"hubtransfer.methods.{name}")
    else:
        import difflib

        close = difflib.get_close_matches(name, __dir__(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise AttributeError(f"module 'hubtransfer' has no attribute {name!r}{hint}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_PACKAGES, *_families()})

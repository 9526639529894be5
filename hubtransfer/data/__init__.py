"""Data: what a scenario holds, and the batches it becomes."""

from hubtransfer.data import packaged as packaged  # registers its data sets
from hubtransfer.data.augment import Augment, MixUp
from hubtransfer.data.batch import Batch, Streams
from hubtransfer.data.loader import Loader
from hubtransfer.data.memory import Memory, MemoryConfig, Replay
from hubtransfer.data.memory_kinds import ClassBalanced, GradientBased, Hardest, Herding, Reservoir, Ring
from hubtransfer.data.mixing import Mixing, Mixture
from hubtransfer.data.scenario import DataStream, DomainPair, MultiTask, SingleTask, TaskStream
from hubtransfer.data.source import Source
from hubtransfer.data.sources import Splits, data_source, data_sources, load_data
from hubtransfer.data.table import Table
from hubtransfer.data.task_streams import (
    blurred_stream,
    domain_tasks,
    noised_tasks,
    permuted_tasks,
    rotated_tasks,
    split_tasks,
)

__all__ = [
    "Augment",
    "Batch",
    "ClassBalanced",
    "DataStream",
    "DomainPair",
    "GradientBased",
    "Hardest",
    "Herding",
    "Loader",
    "Memory",
    "MemoryConfig",
    "MixUp",
    "Mixing",
    "Mixture",
    "MultiTask",
    "Replay",
    "Reservoir",
    "Ring",
    "SingleTask",
    "Source",
    "Splits",
    "Streams",
    "Table",
    "TaskStream",
    "blurred_stream",
    "data_source",
    "data_sources",
    "domain_tasks",
    "load_data",
    "noised_tasks",
    "permuted_tasks",
    "rotated_tasks",
    "split_tasks",
]

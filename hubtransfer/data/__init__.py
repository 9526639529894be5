"""Data: what a scenario holds, and the batches it becomes."""

from hubtransfer.data.augment import Augment, MixUp
from hubtransfer.data.batch import Batch, Streams
from hubtransfer.data.loader import Loader
from hubtransfer.data.mixing import Mixing, Mixture
from hubtransfer.data.scenario import DataStream, DomainPair, MultiTask, SingleTask, TaskStream
from hubtransfer.data.source import Source
from hubtransfer.data.sources import Splits, data_source, data_sources, load_data
from hubtransfer.data.table import Table

__all__ = [
    "Augment",
    "Batch",
    "DataStream",
    "DomainPair",
    "Loader",
    "MixUp",
    "Mixing",
    "Mixture",
    "MultiTask",
    "SingleTask",
    "Source",
    "Splits",
    "Streams",
    "Table",
    "TaskStream",
    "data_source",
    "data_sources",
    "load_data",
]

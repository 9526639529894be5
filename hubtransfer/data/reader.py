"""From row numbers to the model's inputs, each example processed once where that fits in memory."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from hubtransfer.data.batch import Batch
from hubtransfer.data.seeds import seeded
from hubtransfer.data.source import COMPANIONS, Fields, Source
from hubtransfer.data.table import ArrayTable, Values, as_labels

Processor = Callable[..., Mapping[str, Tensor]]
"""``processor(images_or_texts) -> inputs``."""

TOKENS = ("input_ids", *COMPANIONS)


def process(
    columns: Mapping[str, Values], fields: Fields, processor: Processor | None, where: str
) -> dict[str, Tensor]:
    """Inputs and labels of some rows as tensors.

    Args:
        columns: values by column.
        fields: which columns are what.
        processor: turns images or texts into inputs; None: the columns are the inputs.
        where: the data set, for messages.

    Returns:
        The model's inputs by name, and labels under ``labels`` or ``labels/<task>``; every one ``(rows, ...)``.

    Raises:
        ValueError: values that no processor handles differ in shape.
    """
    found: dict[str, Tensor] = {}
    for name, column in fields.inputs.items():
        values = columns[column]
        if name in TOKENS:
            found |= _pad_tokens(name, values, processor)
        elif processor is not None:
            found |= processor(values)
        elif isinstance(values, Tensor):
            found[name] = values
        else:
            raise ValueError(f"{where}: column {column!r} holds no tensor of one shape, and there is no processor")
    if "input_ids" in fields.inputs and "attention_mask" not in found:
        found["attention_mask"] = torch.ones_like(found["input_ids"])
    labels = fields.labels
    if isinstance(labels, str):
        found["labels"] = as_labels(columns[labels], labels)
    elif labels is not None:
        found |= {f"labels/{task}": as_labels(columns[column], column) for task, column in labels.items()}
    return found


def _pad_tokens(name: str, values: Values, processor: Processor | None) -> dict[str, Tensor]:
    """Token numbers of unequal lengths, padded at the end to the longest; their mask comes with ``input_ids``."""
    if isinstance(values, Tensor):
        return {name: values.long()}
    rows = [torch.as_tensor(row, dtype=torch.long) for row in values]
    pad = getattr(getattr(processor, "tokenizer", None), "pad_token_id", None) or 0
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad if name == "input_ids" else 0)
    if name != "input_ids":
        return {name: padded}
    lengths = torch.tensor([len(row) for row in rows])
    return {name: padded, "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long()}


def as_batch(values: Mapping[str, Tensor], source: Source, index: Tensor | None, **facts: Any) -> Batch:
    """Split what :func:`process` gives into inputs and labels."""
    tasks = {name.removeprefix("labels/"): value for name, value in values.items() if name.startswith("labels/")}
    labels = tasks or values.get("labels")
    inputs = {name: value for name, value in values.items() if not name.startswith("labels")}
    return Batch(inputs=inputs, labels=labels, index=index, task=source.task, **facts)


class RowCache:
    """Rows of equal shape, fetched when first wanted and kept.

    Args:
        size: number of rows there are.
        fetch: gives some rows; must give a row the same values whatever rows come with it.
        limit: bytes that may be kept.
        device: where they are kept.
    """

    def __init__(self, size: int, fetch: Callable[[Tensor], Mapping[str, Values]], limit: int, device: torch.device):
        self.fetch, self.device = fetch, device
        first = fetch(torch.zeros(1, dtype=torch.long))
        tensors = {name: value for name, value in first.items() if isinstance(value, Tensor)}
        bytes_needed = size * sum(value.numel() * value.element_size() for value in tensors.values())
        if device.type == "cuda":
            limit = min(limit, torch.cuda.mem_get_info(device)[0] // 4)
        self.fits = len(tensors) == len(first) and bytes_needed <= limit
        self.missing, self.bytes = size, bytes_needed
        if self.fits:
            self.values = {
                name: torch.empty((size, *value.shape[1:]), dtype=value.dtype, device=device)
                for name, value in tensors.items()
            }
            self.filled = torch.zeros(size, dtype=torch.bool)

    def __call__(self, index: Tensor) -> dict[str, Tensor] | None:
        """Values of the rows ``index``, or None when they turn out not to have one shape."""
        if self.missing and not self._fill(index):
            return None
        index = index.to(self.device, non_blocking=True)
        return {name: value.index_select(0, index) for name, value in self.values.items()}

    def _fill(self, index: Tensor) -> bool:
        absent = index[~self.filled[index]].unique()
        if len(absent):
            rows = absent.to(self.device)
            for name, value in self.fetch(absent).items():
                kept = self.values[name]
                if not isinstance(value, Tensor) or value.shape[1:] != kept.shape[1:] or value.dtype != kept.dtype:
                    self.fits = False
                    return False
                kept.index_copy_(0, rows, value.to(self.device))
            self.filled[absent] = True
            self.missing -= len(absent)
        return True


class Reader:
    """Reads rows of a source as model inputs.

    What is kept, in this order of preference and as far as ``cache_limit`` allows: processed inputs (on the GPU
    when there is room), else decoded images, else nothing. Data sets that compute their rows are never kept.

    Args:
        source: what to read.
        processor: turns images or texts into inputs.
        cache_limit: bytes that may be kept.
        device: where batches go.
        in_process: whether rows are read in this process; then decoded images may be kept, and are processed on
            the GPU. Worker processes must not touch it.
    """

    def __init__(
        self,
        source: Source,
        processor: Processor | None,
        cache_limit: int,
        device: torch.device,
        in_process: bool = True,
    ):
        self.in_process, self.device = in_process, device
        self.source, self.processor = source, processor
        self.table, self.fields = source.table, source.fields
        self.extent: Tensor | None = None  # (rows, 2) first and last+1 position that the attention mask keeps
        self.processed: RowCache | None = None
        self.raw: RowCache | None = None
        if self.table.fixed:
            self._choose(cache_limit, device)

    @property
    def direct(self) -> bool:
        """Whether rows are read and processed anew each time, so that worker processes help."""
        return self.processed is None and not self._ready

    @property
    def bytes(self) -> int:
        """Memory that is kept."""
        return sum(cache.bytes for cache in (self.processed, self.raw) if cache is not None)

    _ready = False

    def _choose(self, limit: int, device: torch.device) -> None:
        size = len(self.table)
        if self._is_text:
            self._tokenise(limit)
            return
        self._ready = device.type == "cpu" and (self._passes_through() or self._only_scales())
        if self._ready:
            return
        cache = RowCache(size, self._read, limit, device)
        if not cache.fits and device.type != "cpu":
            cache = RowCache(size, self._read, limit, torch.device("cpu"))
        if cache.fits:
            self.processed = cache
        elif self.in_process and not isinstance(self.table, ArrayTable):
            raw = RowCache(size, self._gather, limit, torch.device("cpu"))
            self.raw = raw if raw.fits else None

    @property
    def _is_text(self) -> bool:
        return "text" in self.fields.inputs or "input_ids" in self.fields.inputs

    def _passes_through(self) -> bool:
        """Whether processing hands out the very columns of a table in memory: then a copy would only cost memory."""
        if not isinstance(self.table, ArrayTable):
            return False
        values = [self.table.values[column] for column in self.fields.columns]
        if not all(isinstance(value, Tensor) for value in values):
            return False
        inputs = [self.table.values[column] for column in self.fields.inputs.values()]
        if self.processor is not None and any(v.dtype == torch.uint8 for v in inputs if isinstance(v, Tensor)):
            return False
        raw = {name: self.table.values[name][:1] for name in self.fields.columns}
        addresses = {value.data_ptr() for value in raw.values() if isinstance(value, Tensor)}
        return all(v.data_ptr() in addresses for v in process(raw, self.fields, self.processor, "").values())

    def _only_scales(self) -> bool:
        """Whether rows are in memory and processing is cheaper than to keep the result, which is four times as large.

        Views, such as a permutation of pixels for each of twenty tasks, then cost no memory at all.
        """
        if not self.table.in_memory:
            return False
        values = self.table.gather(torch.zeros(1, dtype=torch.long), self.fields.columns)
        check = getattr(self.processor, "is_elementwise", lambda raw: self.processor is None)
        inputs = [values[column] for column in self.fields.inputs.values()]
        return all(isinstance(v, Tensor) for v in values.values()) and all(check(value) for value in inputs)

    def unprocessed(self, index: Tensor) -> dict[str, Tensor]:
        """Inputs before processing, from a table in memory."""
        found = self.table.gather(index, list(self.fields.inputs.values()))
        named = {name: found[column] for name, column in self.fields.inputs.items()}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    @property
    def gives_unprocessed(self) -> bool:
        """Whether `unprocessed` can give anything."""
        return self.table.in_memory and not self._is_text

    def _tokenise(self, limit: int) -> None:
        """Tokenise everything at once: padding is to the longest text, batches are cut to theirs."""
        size, head = len(self.table), torch.arange(min(64, len(self.table)))
        sample = self._read(head)
        per_row = sum(value.numel() * value.element_size() for value in sample.values()) / len(head)
        if 2 * per_row * size > limit:  # twice, for the longest text may not be in the sample
            return
        everything = self._read(torch.arange(size))
        self.table = ArrayTable(everything)
        labels = self.fields.labels
        kept = labels if labels is None else "labels" if isinstance(labels, str) else {t: f"labels/{t}" for t in labels}
        self.fields = Fields({name: name for name in everything if not name.startswith("labels")}, kept)
        self.extent = extent_of(everything.get("attention_mask"))
        self.processor, self._ready = None, True

    def _gather(self, index: Tensor) -> dict[str, Values]:
        return self.table.gather(index, self.fields.columns)

    def _read(self, index: Tensor) -> dict[str, Tensor]:
        columns: Mapping[str, Values] | None = None
        if self.raw is not None:
            columns = self.raw(index)
            if columns is None:
                self.raw = None
        if columns is None:
            columns = self._gather(index)
        if self.device.type == "cuda" and self.in_process and getattr(self.processor, "kind", None) == "image":
            columns = {name: self._moved(name, value) for name, value in columns.items()}
        return process(columns, self.fields, self.processor, self.source.where)

    def _moved(self, name: str, value: Values) -> Values:
        """Raw images on the GPU: a quarter of the bytes to copy, and resizing is fast there."""
        raw = isinstance(value, Tensor) and value.dtype == torch.uint8 and name in self.fields.inputs.values()
        return value.pin_memory().to(self.device, non_blocking=True) if raw and isinstance(value, Tensor) else value

    def read(self, index: Tensor, together: Tensor, seed: int) -> dict[str, Tensor]:
        """Inputs and labels of some rows.

        Args:
            index: the rows, int64 ``(count,)``.
            together: rows of all processes' batches: texts are padded to the longest of these.
            seed: for data sets whose code is random.
        """
        if not self.table.fixed:
            with seeded(seed):
                return self._read(index)
        if self.processed is not None:
            values = self.processed(index)
            if values is not None:
                return values
            self.processed = None
        values = self._read(index)
        return values if self.extent is None else trim(values, self.extent[together])


def extent_of(mask: Tensor | None) -> Tensor | None:
    """First and one past the last position that each row of an attention mask keeps, ``(rows, 2)``."""
    if mask is None:
        return None
    kept = mask != 0
    first = kept.int().argmax(1)
    last = kept.shape[1] - kept.flip(1).int().argmax(1)
    return torch.stack([first, last], dim=1)


def trim(values: Mapping[str, Tensor], extent: Tensor) -> dict[str, Tensor]:
    """Cut padding that no row needs from token columns."""
    first, last = int(extent[:, 0].min()), int(extent[:, 1].max())
    return {name: value[:, first:last] if name in TOKENS else value for name, value in values.items()}


def facts_of(processor: Processor | None) -> str:
    """What tells processors apart: their settings where they can say them, else the object."""
    to_dict = getattr(processor, "to_dict", None)
    if not callable(to_dict):
        return f"{type(processor)} {_number(processor)}"
    tokenizer = getattr(processor, "tokenizer", None)
    words = "" if tokenizer is None else f" {getattr(tokenizer, 'name_or_path', '')} {len(tokenizer)}"
    return f"{sorted(map(str, to_dict().items()))}{words}"


def fingerprint_of(source: Source, processor: Processor | None) -> str:
    """Key of a source's processed rows: content, columns and processor."""
    inputs: Sequence[Any] = sorted(source.fields.inputs.items())
    return sha256(f"{source.table.fingerprint()} {inputs} {facts_of(processor)}".encode()).hexdigest()


_numbered: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def _number(thing: Any) -> int:
    """A number of its own for each object; addresses are used again after an object's end."""
    if thing is None:
        return 0
    return _numbered.setdefault(thing, len(_numbered) + 1 + max(_numbered.values(), default=0))


_kept: OrderedDict[Any, Reader] = OrderedDict()


def reader_for(
    source: Source, processor: Processor | None, cache_limit: int, device: torch.device, in_process: bool
) -> Reader:
    """A reader, the same for the same source while memory allows, so that later stages need not process again.

    Readers that no loader uses any more are kept up to ``cache_limit`` bytes in all, those last asked for.
    """
    key = (id(source), facts_of(processor), cache_limit, str(device), in_process)
    reader = _kept.pop(key, None) or Reader(source, processor, cache_limit, device, in_process)
    _kept[key] = reader  # holds the source, so its id stays its own
    while len(_kept) > 1 and (len(_kept) > 64 or sum(kept.bytes for kept in _kept.values()) > cache_limit):
        _kept.popitem(last=False)
    return reader

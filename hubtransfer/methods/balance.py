"""One step on the losses of several tasks, from one forward pass: what a rule may ask, and the update that asks it."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from hubtransfer.backbones import Features
from hubtransfer.data import Batch, MultiTask
from hubtransfer.functional.gradient_norms import convolution_gradient_norms, worth_it
from hubtransfer.functional.graphs import convolution_with, leaves_of
from hubtransfer.methods.aggregate import Gradients
from hubtransfer.methods.multi_task_method import MultiTaskMethod
from hubtransfer.methods.stage import OptimizerConfig, Stage
from hubtransfer.methods.task_losses import over_processes, task_sources
from hubtransfer.methods.update import AnyBatch, Terms, Update
from hubtransfer.models import TransferModel

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime

PIECE = 32_768
"""Numbers of a gradient that are multiplied at a time: they stay in a processor's cache."""


class TaskPass(NamedTuple):
    """One task's loss, cut off where its head starts.

    Attributes:
        loss: Scalar; its graph ends at the copies.
        outputs: What the trunk gave, in the trunk's graph: pooled features and maps.
        copies: The leaves that the head read in their place.
    """

    loss: Tensor
    outputs: list[Tensor]
    copies: list[Tensor]


class CutLosses(NamedTuple):
    """The losses of all tasks on one batch.

    Attributes:
        passes: Task -> its loss, for the tasks that the batch holds.
        labelled: Which tasks have a label in the batch, bool (tasks,).
        one_pass: Whether the trunk ran once for all: then every task has the same outputs.
    """

    passes: dict[str, TaskPass]
    labelled: Tensor
    one_pass: bool


class TaskGradients:
    r"""The gradients of several tasks' losses, made as far as a rule asks for them.

    The heads' backward passes are done: each task read its own copy of the trunk's output z, so that one backward pass
    of the sum of all losses gave :math:`g_t = \partial L_t / \partial z` of every task and the gradients of all heads.
    The trunk's graph is still there. Over several processes everything is what one process with all examples would
    have.

    Attributes:
        losses: (tasks,).
        labelled: Which tasks have a label in the batch, bool (tasks,); the others have zero loss and gradient.
        one_pass: Whether all tasks read the same output of the trunk.
    """

    def __init__(self, cut: CutLosses, method: MultiTaskMethod, runtime: "Runtime", shared: str, own: str) -> None:
        self.one_pass = cut.one_pass
        self._runtime = runtime
        self._tasks = method.tasks
        self._passes = [cut.passes.get(task) for task in method.tasks]
        self._shared, self._own_params = runtime.params(shared), runtime.params(own)
        there = [p for p in self._passes if p is not None]
        zero = torch.zeros((), dtype=there[0].loss.dtype, device=there[0].loss.device)
        values = [zero if p is None else p.loss.detach().to(zero) for p in self._passes]
        facts = runtime.reduce(torch.stack([torch.stack(values), cut.labelled.to(zero)]))
        self.losses, self.labelled = facts[0], facts[1] > 0
        self._owner = _owners(method.model, method.tasks, self._own_params)
        self._after_heads(there)

    def _after_heads(self, there: list[TaskPass]) -> None:
        copies = [copy for p in there for copy in p.copies]
        found = torch.autograd.grad([p.loss for p in there], [*copies, *self._own_params], allow_unused=True)
        own = found[len(copies) :]
        self._in_trunk = [k for k, gradient in enumerate(own) if gradient is None]  # patches: known after the trunk
        self._own = self._runtime.mean([torch.zeros_like(p) if g is None else g for g, p in zip(own, self._own_params)])
        seeds = iter(found[: len(copies)])
        self._seeds = [None if p is None else [next(seeds) for _ in p.copies] for p in self._passes]

    @property
    def terms(self) -> Terms:
        """The losses of the tasks that have labels, by name."""
        return {t: loss for t, loss, there in zip(self._tasks, self.losses, self.labelled.tolist()) if there}

    # ------------------------------------------------------------------------------------ what rules look at

    def feature_gram(self) -> Tensor:
        r"""Inner products of the tasks' gradients at the trunk's output, over the whole batch: (tasks, tasks).

        .. math:: G_{st} = \sum_{i} \langle \partial L_s / \partial z_i, \partial L_t / \partial z_i \rangle

        Raises:
            ValueError: if the tasks do not read the same output.
        """
        if not self.one_pass:
            raise ValueError("the tasks' gradients lie at different outputs of the trunk, which cannot be compared")
        count = len(self._tasks)
        gram = torch.zeros(count, count, dtype=torch.float64, device=self.losses.device)
        for readers, stacked in self._by_output:
            if not readers:
                continue
            flat = stacked.flatten(1)
            flat = flat.float() if flat.dtype.itemsize < 4 else flat
            products = (flat @ flat.T).to(gram)
            if len(readers) == count:
                gram += products
            else:
                place = torch.tensor(readers, device=gram.device)
                gram[place[:, None], place] += products
        return self._runtime.reduce(gram, "sum") / self._runtime.world**2  # L is the mean of the processes' losses

    def gram(self) -> Tensor:
        """Inner products of the tasks' gradients of the shared parameters: (tasks, tasks), piece by piece."""
        gram = torch.zeros(len(self._tasks), len(self._tasks), dtype=torch.float64, device=self.losses.device)
        for column in zip(*self.rows()):
            for pieces in zip(*(gradient.flatten().split(PIECE) for gradient in column)):
                stacked = torch.stack(pieces)
                gram += stacked @ stacked.T
        return gram

    def norms(self, parameter: Tensor) -> Tensor:
        """L2 norm of each task's gradient of one shared parameter, (tasks,)."""
        found = self._convolution_norms(parameter)
        if found is not None:
            return found
        norms = [self._pull(k, [parameter], retain_graph=True)[0].norm() for k in range(len(self._tasks))]
        return torch.stack(norms)

    def rows(self) -> list[Gradients]:
        """Each task's gradient of the shared parameters, one backward pass of the trunk a task."""
        return [row[: len(self._shared)] for row in self._rows]

    def depended_on(self, params: Mapping[str, nn.Parameter]) -> list[str]:
        """Returns the names of those of some trunk parameters on which the loss of every task in the batch depends."""
        pairs = [(p, seeds) for p, seeds in zip(self._passes, self._seeds) if p is not None and seeds is not None]
        read = [[o for o, seed in zip(p.outputs, seeds) if seed is not None] for p, seeds in pairs]
        behind = [set(leaves_of(outputs)) for outputs in read]
        return [name for name, p in params.items() if all(p in leaves for leaves in behind)]

    # --------------------------------------------------------------------------------------- what rules give

    def shared(self, weights: Tensor) -> Gradients:
        """The weighted sum of the tasks' gradients of the shared parameters.

        Takes one backward pass of the trunk, or none where the rows are known.

        Args:
            weights: (tasks,).
        """
        if not self.one_pass or "_rows" in self.__dict__:
            return _combined(self.rows(), weights)
        outputs = next(p for p in self._passes if p is not None).outputs
        pairs = [
            (output, torch.tensordot(weights[readers].to(stacked), stacked, 1))
            for output, (readers, stacked) in zip(outputs, self._by_output)
            if readers
        ]
        return self._runtime.grad([output for output, _ in pairs], self._shared, seeds=[seed for _, seed in pairs])

    def own(self, weights: Tensor | None = None) -> Gradients:
        """The gradient of each task's own parameters.

        Args:
            weights: Factor of each task, (tasks,); by default every head follows its own loss.
        """
        gradients = list(self._own)
        for k in self._in_trunk if not self.one_pass else ():
            gradients[k] = self._rows[self._owner[k]][len(self._shared) + self._in_trunk.index(k)]
        if weights is None:
            return gradients
        return [gradient * weights[owner].to(gradient) for gradient, owner in zip(gradients, self._owner)]

    def agreed(self, tensor: Tensor) -> Tensor:
        """The value of process 0, for what was drawn at random."""
        return self._runtime.broadcast(tensor)

    # -------------------------------------------------------------------------------------------- mechanics

    @cached_property
    def _by_output(self) -> list[tuple[list[int], Tensor]]:
        """For each output of the trunk: the tasks that read it, and their gradients of it, stacked."""
        found = []
        there = [p for p in self._passes if p is not None]
        for place, output in enumerate(there[0].outputs):
            seeds = {k: s[place] for k, s in enumerate(self._seeds) if s is not None and s[place] is not None}
            readers = list(seeds) if output.requires_grad else []
            found.append((readers, torch.stack([seeds[k] for k in readers]) if readers else output))
        return found

    @cached_property
    def _rows(self) -> list[Gradients]:
        """Gradients of the shared parameters and of the patches, by task."""
        params = [*self._shared, *(self._own_params[k] for k in self._in_trunk)]
        return [self._pull(k, params, retain_graph=self._read_later(k)) for k in range(len(self._tasks))]

    def _pull(self, task: int, params: Sequence[Tensor], retain_graph: bool) -> Gradients:
        outputs, seeds = self._where(task)
        return self._runtime.grad(outputs, params, seeds=seeds, retain_graph=retain_graph)

    def _read_later(self, task: int) -> bool:
        """Says whether a later task reads the same output of the trunk."""
        own, *later = self._passes[task:]
        return own is not None and any(p is not None and p.outputs[0] is own.outputs[0] for p in later)

    def _where(self, task: int) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs of the trunk that a task's loss depends on, and its gradients of them."""
        found, seeds = self._passes[task], self._seeds[task]
        pairs = [] if found is None or seeds is None else list(zip(found.outputs, seeds))
        pairs = [(output, seed) for output, seed in pairs if seed is not None and output.requires_grad]
        return [output for output, _ in pairs], [seed for _, seed in pairs]

    def _convolution_norms(self, parameter: Tensor) -> Tensor | None:
        """The norms without the gradients, where that is possible and takes less time."""
        places = [self._where(task) for task in range(len(self._tasks))]
        if not self.one_pass or self._runtime.world > 1 or not all(outputs for outputs, _ in places):
            return None  # over processes the norm of the mean gradient needs the gradients
        node = convolution_with(places[0][0], parameter)
        if node is None:
            return None
        edge = GradientEdge(node, 0)
        slopes = [torch.autograd.grad(outputs, edge, seeds, retain_graph=True)[0] for outputs, seeds in places]
        if not worth_it(node._saved_input, slopes[0], parameter.shape[2:], len(slopes)):
            return None
        shape = (parameter.shape[2:], node._saved_stride, node._saved_padding, node._saved_dilation)
        return convolution_gradient_norms(node._saved_input, slopes, *shape)


@dataclass(frozen=True, eq=False)
class Balance(Update):
    """One step on several tasks' losses, weighed by a rule, with one forward pass of the trunk.

    Attributes:
        method: The method, whose tasks and model they are.
        rule: From the tasks' gradients to a gradient for each group, in the order of its parameters.
        after: Called with the tasks' gradients after the step.
        further: Groups besides "shared" and "heads" that the rule gives gradients for.
    """

    method: MultiTaskMethod
    rule: Callable[[TaskGradients], Mapping[str, Gradients]]
    after: Callable[[TaskGradients], None] | None = None
    further: tuple[str, ...] = ()

    def groups(self) -> tuple[str, ...]:
        """What tasks share, what belongs to one task, and what the rule learns."""
        return ("shared", "heads", *self.further)

    def apply(self, batch: AnyBatch, runtime: "Runtime") -> Terms:
        """Takes the step and returns the tasks' losses."""
        cut: Any = runtime.call(self.losses, batch)
        gradients = TaskGradients(cut, self.method, runtime, "shared", "heads")
        runtime.step(self.rule(gradients))
        if self.after is not None:
            self.after(gradients)
        return gradients.terms

    def losses(self, batch: AnyBatch) -> Any:
        """Returns the tasks' losses, cut off where the heads start.

        The trunk runs once for the tasks that share inputs, and once more for each with a patch or networks of its own.
        """
        model, tasks = self.method.model, self.method.tasks
        passes, own = {}, {}
        if isinstance(batch, Batch):
            own = dict.fromkeys(self.method.alone(), batch)
            if together := [task for task in tasks if task not in own]:
                layers = dict.fromkeys(layer for task in together for layer in model.layers_for(task))
                features = model.features(batch.inputs, layers=tuple(layers), task=together[0])
                passes = {t: _cut(model, t, batch, features) for t in together}
        else:
            own = {t: batch[t] for t in tasks if t in batch}
        passes |= {t: _cut(model, t, b, model.features(b.inputs, model.layers_for(t), t)) for t, b in own.items()}
        losses = over_processes({t: p.loss for t, p in passes.items()}, model, tasks, batch)
        passes = {t: p._replace(loss=losses[t]) for t, p in passes.items()}
        return CutLosses(passes, self.method.labelled(batch), one_pass=not own)


class Balancing(MultiTaskMethod):
    """A method that makes one gradient of the trunk from the tasks' gradients; a subclass says how, in `combine`."""

    def __init__(self, model: TransferModel, tasks: Sequence[str] | None = None, **config: Any) -> None:
        super().__init__(model, tasks, **config)
        self.register_buffer("weights", torch.full((len(self.tasks),), 1 / len(self.tasks)))

    @abstractmethod
    def combine(self, gradients: TaskGradients) -> Mapping[str, Gradients]:
        """Returns a gradient for each group."""

    def groups(self) -> Mapping[str, Any]:
        """Two groups: what tasks share, and what belongs to one task (heads and patches)."""
        shared, own = self.shared_and_own()
        return {"shared": shared, "heads": own}

    def stages(self, scenario: MultiTask) -> Iterator[Stage]:
        """One stage.

        Raises:
            ValueError: if a task has no data, or the trunk is frozen.
        """
        yield self.balanced(scenario, Balance(self, self.combine))

    def balanced(
        self, scenario: MultiTask, update: Balance, optimizers: Mapping[str, OptimizerConfig] | None = None
    ) -> Stage:
        """Returns the stage of one update."""
        name = type(self).__name__
        if not self.shared_and_own()[0]:
            raise ValueError(
                f"{name} balances the tasks' gradients of the trunk, but the trunk is frozen: none of its parameters "
                "requires gradients. Unfreeze some, or train the heads with a method that only weighs losses."
            )
        return Stage("balance", task_sources(scenario, self.tasks, name), [update], optimizers=optimizers or {})

    def keep(self, weights: Tensor, gradients: TaskGradients) -> Tensor:
        """Remembers the weights for the log, those of tasks without labels in the batch excepted, and returns them."""
        self.weights.copy_(torch.where(gradients.labelled, weights.to(self.weights), self.weights))
        return weights


def over_labelled(weigh: Callable[[Tensor, Tensor], Tensor], gram: Tensor, gradients: TaskGradients) -> Tensor:
    """Weighs the tasks that have labels in the batch by their Gram matrix and losses; the others get zero.

    A task without labels has no gradient, which says nothing about the trunk: with it in the matrix the shortest
    combination would be that zero.
    """
    there = gradients.labelled
    if bool(there.all()):
        return weigh(gram, gradients.losses)
    weights = torch.zeros_like(gram[0])
    if bool(there.any()):
        weights[there] = weigh(gram[there][:, there], gradients.losses[there]).to(weights)
    return weights


def _cut(model: TransferModel, task: str, batch: Batch, features: Features) -> TaskPass:
    """One task's loss on copies of the features."""
    names = list(features.maps)
    outputs = [features.pooled, *(features.maps[name] for name in names)]
    copies = [output.detach().requires_grad_() for output in outputs]
    read = Features(copies[0], dict(zip(names, copies[1:])))
    labels: Any = batch.labels[task] if isinstance(batch.labels, dict) else batch.labels
    loss = model.loss(model.logits(read, task, inputs=batch.inputs), labels, task)
    return TaskPass(loss, outputs, copies)


def _owners(model: TransferModel, tasks: Sequence[str], params: Sequence[nn.Parameter]) -> list[int]:
    """For each parameter the number of the task it belongs to."""
    owner: dict[int, int] = {}
    for number, task in enumerate(tasks):
        for modules in (model.heads, model.patches):
            if task in modules:
                owner |= {id(p): number for p in modules[task].parameters()}
    return [owner[id(p)] for p in params]


def _combined(rows: Sequence[Gradients], weights: Tensor) -> Gradients:
    """The weighted sum of rows."""
    first, *others = weights.tolist()
    result = [gradient * first for gradient in rows[0]]
    for row, factor in zip(rows[1:], others):
        for total, gradient in zip(result, row):
            total.add_(gradient, alpha=factor)
    return result

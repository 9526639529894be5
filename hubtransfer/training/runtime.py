"""The one place that knows about processes, precision and optimisers."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, broadcast
from torch import Tensor, nn
from torch.func import functional_call

from hubtransfer.methods.aggregate import Combine, Sum
from hubtransfer.methods.method import Method
from hubtransfer.methods.stage import Stage
from hubtransfer.methods.update import AnyBatch, Descend, Loss, Terms, total
from hubtransfer.training.arguments import TrainingArguments
from hubtransfer.training.normalisation import share_statistics
from hubtransfer.training.optimizers import Schedule, make_optimizer
from hubtransfer.training.sharding import is_sharded, method_state

_MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


@dataclass(frozen=True)
class SGDState:
    """What one parameter's next SGD step depends on, besides its gradient."""

    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool
    velocity: Tensor | None


class Runtime:
    """Runs a method's updates on one process or many, in full or mixed precision.

    Two gradient paths stand behind `descend`. A stage whose only update is one plain `Descend` goes through
    Accelerate's engine (prepared model, `accelerator.backward`), so that DDP overlap, FSDP, accumulation and fp16
    scaling work. Every other stage uses `torch.autograd.grad` on the parameters of the group and one flat all-reduce.
    Both give the same parameters.
    """

    def __init__(self, method: Method, arguments: TrainingArguments) -> None:
        mixed = _MIXED[arguments.precision]
        if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed:
            AcceleratorState._reset_state(reset_partial_state=False)  # precision belongs to a run, not to the process
        handler = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
        self.accelerator = Accelerator(
            mixed_precision=mixed,
            log_with=arguments.tracker,
            project_dir=arguments.output_dir,
            kwargs_handlers=[handler],
        )
        self.arguments = arguments
        self.method = method.to(self.device)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self._schedules: list[Schedule] = []
        self._params: dict[str, list[nn.Parameter]] = {}
        self._wrapped: nn.Module | None = None
        self._micro, self._micros = 0, 1
        self._before: dict[nn.Parameter, bool] = {}
        self._plain: Method | None = None

    # ---------------------------------------------------------------- facts

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self.accelerator.device

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.accelerator.num_processes

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.accelerator.process_index

    @property
    def is_main(self) -> bool:
        """Whether this is process 0, the one that writes files and talks."""
        return self.accelerator.is_main_process

    def params(self, group: str) -> list[nn.Parameter]:
        """Returns the parameters of a group of the current stage."""
        return self._params[group]

    def names(self, group: str) -> list[str]:
        """Returns their names within the method."""
        names = {id(p): name for name, p in self.method.named_parameters()}
        return [names[id(p)] for p in self.params(group)]

    # ---------------------------------------------------------------- stages

    def begin(self, stage: Stage, steps: int) -> None:
        """Readies a stage: what requires gradients, what is in training mode, optimisers, the gradient path.

        Raises:
            ValueError: if an update names an unknown or empty group, or the setting does not allow the stage.
        """
        groups = self.method.groups()
        trained = stage.trains()
        looked_at = [group for update in stage.updates for group in update.looks_ahead()]
        where = f"{type(self.method).__name__}, stage {stage.name!r}"
        for group in (*trained, *looked_at):
            if group not in groups:
                raise ValueError(f"{where}: an update names group {group!r}; the method has {sorted(groups)}")
        torch_groups = {name: _torch_groups(groups[name]) for name in dict.fromkeys((*trained, *looked_at))}
        self._params = {name: [p for g in parts for p in g["params"]] for name, parts in torch_groups.items()}
        for name, parameters in self._params.items():
            if not parameters:
                raise ValueError(f"{where}: group {name!r} has no parameter to train; check what the method trains")

        self._before = {p: p.requires_grad for p in self.method.parameters()}
        for parameter in self._before:
            parameter.requires_grad_(False)
        for parameters in self._params.values():
            for parameter in parameters:
                parameter.requires_grad_(True)
        self.method.train()

        plain = len(stage.updates) == 1 and isinstance(stage.updates[0], Descend) and stage.updates[0].is_plain()
        if trained and not plain:
            self._refuse_on_explicit_path(where)
        self.optimizers, self._schedules = {}, []
        for name in trained:
            config = self.arguments.optimizer_for(name, stage.optimizers.get(name))
            optimizer = make_optimizer(config, torch_groups[name])
            self.optimizers[name] = optimizer
            self._schedules.append(Schedule(optimizer, config, steps))
        self._wrapped = None
        if plain:
            self._prepare()

    def _prepare(self) -> None:
        """Hands the method to Accelerate: DDP, FSDP, autocast."""
        if self._is_light:
            self._wrapped = self.accelerator.prepare_model(self.method)
            return
        if is_sharded(self.method):  # by an earlier stage
            self._wrapped = self.method
            return
        if self.accelerator.distributed_type is DistributedType.FSDP and self.is_main:
            self._plain = copy.deepcopy(self.method).cpu()
        self._wrapped, *prepared = self.accelerator.prepare(self.method, *self.optimizers.values())
        self.optimizers = dict(zip(self.optimizers, prepared))
        groups = self.method.groups()  # sharding replaces the parameters
        self._params = {name: [p for g in _torch_groups(groups[name]) for p in g["params"]] for name in self._params}

    def plain_method(self) -> Method:
        """Returns the method with whole parameters, to be saved; under sharding a copy, and all processes must call.

        Only process 0 gets the copy's parameters right.
        """
        if not is_sharded(self.method):
            return self.method
        state = method_state(self.method)
        if self._plain is None:
            return self.method
        for owner, ours in ((self._plain, self.method), (self._plain.model, self.method.model)):
            for operation, keywords in ours.growth[len(owner.growth) :]:
                owner.grow(operation, **keywords)
        self._plain.load_state_dict(state)
        return self._plain

    def end(self) -> None:
        """Undoes `begin`: unwraps the method and gives every parameter its `requires_grad` back."""
        if self._wrapped is not None:
            # Accelerate's autocast wrapper sits on the instance, and a mark that keeps it from wrapping once more
            for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
                self.method.__dict__.pop(name, None)
            self._wrapped = None
        self.accelerator._models.clear()
        self.accelerator._optimizers.clear()
        for parameter, flag in self._before.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
        self._before = {}

    @cached_property
    def _is_light(self) -> bool:
        """Whether `accelerator.backward` and a prepared optimiser would add nothing but time to every step.

        They scale fp16 losses and drive sharded engines. Otherwise they look up installed packages and signatures at
        each call, 0.2 ms a step, and then do what plain torch does.
        """
        plain = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        return self.accelerator.scaler is None and self.accelerator.distributed_type in plain

    def _refuse_on_explicit_path(self, where: str) -> None:
        reason = "it has several updates, repeats, or one gradient for each term"
        if self.accelerator.distributed_type in _SHARDED:
            kind = self.accelerator.distributed_type.value
            raise ValueError(f"{where} cannot run under {kind}: {reason}. Launch it with DDP (multi_gpu.yaml) instead.")
        if self.arguments.accumulation > 1:
            raise ValueError(f"{where} cannot accumulate gradients: {reason}. Use a larger batch_size instead.")
        if self.arguments.precision == "fp16":
            raise ValueError(f"{where} cannot scale fp16 losses: {reason}. Use precision='bf16' instead.")

    # ---------------------------------------------------------------- one step

    def set_step(self, step: int) -> None:
        """Sets every learning rate to its value at a step of the stage."""
        for schedule in self._schedules:
            schedule.set(step)

    def set_micro_batch(self, number: int, of: int) -> None:
        """Says which of the batches of one accumulated step comes next."""
        self._micro, self._micros = number, of

    def call(self, loss: Loss, batch: AnyBatch, weights: Mapping[str, Tensor] | None = None) -> Terms:
        """Evaluates a loss of the method, with other weights where they are given."""
        if self._wrapped is not None and weights is None:
            return self._wrapped(loss, batch)
        with self.accelerator.autocast():
            if weights is None:
                return self.method(loss, batch)
            return functional_call(self.method, dict(weights), (loss, batch))

    def descend(self, update: Descend, batch: AnyBatch) -> Terms:
        """Takes one step of a `Descend` and returns its terms."""
        terms = self.call(update.loss, batch) if self._wrapped is None else self._engine_step(update, batch)
        if self._wrapped is None:
            self.step(self._gradients(update, terms))
        return terms

    def _engine_step(self, update: Descend, batch: AnyBatch) -> Terms:
        assert self._wrapped is not None
        last = self._micro == self._micros - 1
        with nullcontext() if last else self.accelerator.no_sync(self._wrapped):
            terms = self.call(update.loss, batch)
            objective = total(terms) if self._micros == 1 else total(terms) / self._micros
            if self._is_light:
                objective.backward()
            else:
                self.accelerator.backward(objective)
        if last:
            for group in update.groups():
                if self.arguments.clip_norm is not None:
                    self.accelerator.clip_grad_norm_(self._params[group], self.arguments.clip_norm)
                self.optimizers[group].step()
            for group in update.groups():
                self._forget_gradients(group)
            share_statistics(self)
        return terms

    def _gradients(self, update: Descend, terms: Terms) -> dict[str, list[Tensor]]:
        groups = update.groups()
        params: list[Tensor] = [p for group in groups for p in self._params[group]]
        rules: list[Combine] = [update.rule(group) for group in groups]
        if all(type(rule) is Sum for rule in rules):  # which asks for no values of the terms
            gradients, losses = [self.grad(total(terms), params)], torch.empty(0)
        else:
            last = len(terms) - 1
            gradients = [self.grad(term, params, retain_graph=k < last) for k, term in enumerate(terms.values())]
            losses = self.reduce(torch.stack([term.detach() for term in terms.values()]))
        result, start = {}, 0
        for group, rule in zip(groups, rules):
            stop = start + len(self._params[group])
            rows = [row[start:stop] for row in gradients]
            result[group] = rows[0] if len(rows) == 1 and type(rule) is Sum else rule.from_rows(rows, losses)
            start = stop
        return result

    def grad(
        self,
        outputs: Tensor | Sequence[Tensor],
        params: Sequence[Tensor],
        *,
        seeds: Sequence[Tensor] | None = None,
        create_graph: bool = False,
        retain_graph: bool | None = None,
    ) -> list[Tensor]:
        """Returns the gradient with respect to each parameter, averaged over processes; zeros where it is unused.

        Args:
            outputs: A loss, or several tensors whose own gradients are `seeds`; of none, or a constant, they are zero.
            params: What to differentiate by.
            seeds: Gradient of the loss with respect to each output.
            create_graph: Whether the gradients are to be differentiated too.
            retain_graph: Whether the graph stays.
        """
        found: Sequence[Tensor | None] = [None] * len(params)
        if outputs.requires_grad if isinstance(outputs, Tensor) else outputs:
            found = torch.autograd.grad(
                outputs, params, seeds, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True
            )
        return self.mean([torch.zeros_like(p) if g is None else g for g, p in zip(found, params)], create_graph)

    def mean(self, gradients: list[Tensor], differentiable: bool = False) -> list[Tensor]:
        """Returns tensors averaged over processes, in one flat all-reduce."""
        if self.world == 1 or not gradients:
            return gradients
        flat = torch.cat([g.flatten() for g in gradients])
        flat = _DifferentiableMean.apply(flat, self.world) if differentiable else self.reduce(flat)
        return [piece.view_as(g) for piece, g in zip(flat.split([g.numel() for g in gradients]), gradients)]

    def step(self, gradients: Mapping[str, Sequence[Tensor]]) -> None:
        """Gives each group its gradients and steps its optimiser. Nothing else changes."""
        for group, values in gradients.items():
            params = self._params[group]
            for parameter, gradient in zip(params, values):
                parameter.grad = gradient.detach()
            if self.arguments.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(params, self.arguments.clip_norm)
            self.optimizers[group].step()
        for group in gradients:
            self._forget_gradients(group)
        share_statistics(self)

    def _forget_gradients(self, group: str) -> None:
        if self._wrapped is not None and not self._is_light:
            self.optimizers[group].zero_grad(set_to_none=True)  # Accelerate's, which may have something else to do
            return
        for parameter in self._params[group]:  # torch's own zero_grad notes each call for a profiler: 0.05 ms
            parameter.grad = None

    def sgd_state(self, group: str) -> list[SGDState]:
        """Returns, for each parameter of a group, what its next SGD step depends on.

        Raises:
            ValueError: if the group's optimiser is not SGD without dampening.
        """
        optimizer = self.optimizers[group]
        states = []
        for part in optimizer.param_groups:
            if "dampening" not in part or part["dampening"] or part.get("maximize"):
                raise ValueError(
                    f"{type(self.method).__name__} differentiates through steps of group {group!r}, which needs "
                    f"optimizer 'sgd' without dampening; it has {type(optimizer).__name__}"
                )
            for parameter in part["params"]:
                velocity = optimizer.state[parameter].get("momentum_buffer") if parameter in optimizer.state else None
                states.append(SGDState(part["lr"], part["momentum"], part["weight_decay"], part["nesterov"], velocity))
        return states

    # ---------------------------------------------------------------- processes

    def reduce(self, tensor: Tensor, how: str = "mean") -> Tensor:
        """Returns the mean (or sum) of a tensor over processes."""
        return tensor if self.world == 1 else self.accelerator.reduce(tensor, how)

    def mean_of(self, numbers: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Returns the mean of each number over processes, which all give the same names."""
        found = {name: float(value) for name, value in numbers.items()}
        if not found or self.world == 1:
            return found
        return dict(zip(found, self.reduce(torch.tensor(list(found.values()), device=self.device)).tolist()))

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Returns the tensor of process 0."""
        return tensor if self.world == 1 else broadcast(tensor.contiguous())

    def wait(self) -> None:
        """Waits for all processes."""
        self.accelerator.wait_for_everyone()


class _DifferentiableMean(torch.autograd.Function):
    """All-reduce mean whose backward is an all-reduce mean, so that hypergradients are global too."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, world: int) -> Tensor:
        ctx.world = world
        total = flat.clone()
        torch.distributed.all_reduce(total)
        return total / world

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total / ctx.world, None


def _torch_groups(value: nn.Module | Sequence[Any]) -> list[dict[str, Any]]:
    """Returns torch parameter groups, each parameter once."""
    if isinstance(value, nn.Module):
        return [{"params": list(value.parameters())}]
    items = list(value)
    if not items or not isinstance(items[0], dict):
        return [{"params": list(dict.fromkeys(items))}]
    seen: set[int] = set()
    groups = []
    for item in items:
        fresh = [p for p in item["params"] if id(p) not in seen]
        seen.update(map(id, fresh))
        if fresh:
            groups.append({**item, "params": fresh})
    return groups

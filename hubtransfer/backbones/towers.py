"""A network for each task, run side by side on the same inputs, with cross-stitch units between their layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hubtransfer.backbones.backbone import Backbone, Inputs
from hubtransfer.backbones.features import Features
from hubtransfer.backbones.probe import LayerInfo, first_tensor
from hubtransfer.functional.stitch import stitch, stitch_start


class StitchUnit(nn.Module):
    """One cross-stitch unit: a matrix alpha (networks, networks) for each channel; see `functional.stitch`."""

    def __init__(self, networks: int, channels: int, same: float, different: float, like: Tensor) -> None:
        super().__init__()
        self.alpha = nn.Parameter(stitch_start(networks, channels, same, different).to(like))

    def forward(self, activations: Sequence[Tensor], axis: int) -> list[Tensor]:
        """Mixes the networks' activations of one layer, channels on `axis`."""
        return stitch(activations, self.alpha, axis)

    @torch.no_grad()
    def restart(self, same: float, different: float) -> None:
        """Sets alpha to what it is at first for these two."""
        self.alpha.copy_(stitch_start(len(self.alpha), self.alpha.shape[2], same, different))


class TowerTrunk(nn.Module):
    """The towers and the units between them: what a `Towers` backbone trains and saves."""

    def __init__(self, towers: Sequence[Backbone], units: Sequence[StitchUnit]) -> None:
        super().__init__()
        self.towers = nn.ModuleList(towers)
        self.units = nn.ModuleList(units)


class Towers(Backbone):
    """Networks that run side by side, one or more a task. Its features are those of every task at once.

    After each stitched layer every network goes on with a mixture of all networks' activations. A task with several
    networks has their pooled features one after the other, (batch, members * dim), and the first one's maps.

    Args:
        towers: The networks: backbones whose stitched layers have the same names and shapes.
        tasks: The task of each.
        layers: After which layers units stand, shallow to deep; none: the networks are independent of one another.
        same: A unit's alpha for the network itself at first.
        different: For all other networks together.

    Raises:
        ValueError: for fewer than two networks, or layers that are not there or differ in shape, naming them.
    """

    trunk: TowerTrunk

    def __init__(
        self, towers: Sequence[Backbone], tasks: Sequence[str], layers: Sequence[str], same: float, different: float
    ) -> None:
        check_alike(towers, tasks, layers)
        first, count = towers[0], len(towers)
        like = next(first.parameters(), torch.zeros(()))
        units = [StitchUnit(count, first.layer(name).channels, same, different, like) for name in layers]
        super().__init__(
            TowerTrunk(towers, units), modality=first.modality, processor=first.processor, source=first.source
        )
        self.tasks, self.stitched = tuple(tasks), tuple(layers)
        self.members = self.tasks.count(self.tasks[0])
        self.dim = first.dim * self.members
        self.layers = list(first.layers)
        self._sample = first._sample

    def forward(self, inputs: Inputs, layers: Sequence[str] = ()) -> Features:
        """Runs all networks once.

        Args:
            inputs: As any backbone's; all networks see the same.
            layers: Names within each network, of maps that are wanted, after their units.

        Returns:
            Features of the first task, with those of every task in `by_task`.
        """
        found = self._run_stitched(inputs, layers) if self.stitched else [t(inputs, layers) for t in self._towers]
        by_task = {}
        for task in dict.fromkeys(self.tasks):
            own = [one for one, name in zip(found, self.tasks) if name == task]
            pooled = own[0].pooled if len(own) == 1 else torch.cat([one.pooled for one in own], dim=1)
            by_task[task] = Features(self.neck(pooled), own[0].maps)
        return Features(*by_task[self.tasks[0]][:2], by_task)

    def run(self, inputs: Inputs) -> Tensor:
        """Inputs -> the first task's pooled features."""
        return self.forward(inputs).pooled

    def layer(self, name: str) -> LayerInfo:
        """Facts about a layer, by its name within each network."""
        return self._towers[0].layer(name)

    def layer_groups(self) -> list[list[str]]:
        """Groups of the first network's kind, each with that group of all networks; units go with the last."""
        groups = [tower.layer_groups() for tower in self._towers]
        depth = min(map(len, groups))
        merged: list[list[str]] = [[] for _ in range(depth)]
        for number, own in enumerate(groups):
            for k, group in enumerate(own):
                merged[min(k, depth - 1)] += [f"towers.{number}.trunk.{name}" for name in group]
        merged[-1] += [f"units.{k}" for k in range(len(self.units))]
        return merged

    def extra_repr(self) -> str:
        """What print shows beside the sub-modules."""
        return f"tasks={self.tasks}, stitched={self.stitched}, dim={self.dim}"

    @property
    def units(self) -> list[StitchUnit]:
        """The cross-stitch units, shallow to deep."""
        return list(self.trunk.units)  # type: ignore[arg-type]

    def networks(self, task: str) -> list[Backbone]:
        """A task's own networks."""
        return [tower for tower, owner in zip(self._towers, self.tasks) if owner == task]

    @property
    def _towers(self) -> list[Backbone]:
        return list(self.trunk.towers)  # type: ignore[arg-type]

    def _run_stitched(self, inputs: Inputs, layers: Sequence[str]) -> list[Features]:
        self._refuse_checkpointing()
        units = dict(zip(self.stitched, self.units))
        rows = len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)

        def mix(name: str, outputs: Sequence[Any]) -> list[Any]:
            tensors = [first_tensor(output, rows) for output in outputs]
            last = tensors[0].dim() != 4 or self._towers[0]._facts(name)[1]  # type: ignore[union-attr]
            mixed = units[name](tensors, axis=-1 if last else 1)
            return [_with_tensor(output, old, new) for output, old, new in zip(outputs, tensors, mixed)]

        return in_step([partial(tower, inputs, layers) for tower in self._towers], self._meetings, mix)

    def _meetings(self, number: int, meet: Callable[[str, Any], Any]) -> list[Any]:
        """Puts hooks on one network's stitched layers: there it waits for the others."""

        def hook(name: str) -> Callable[..., Any]:
            return lambda module, args, output: meet(name, output)

        trunk = self._towers[number].trunk
        return [trunk.get_submodule(name).register_forward_hook(hook(name)) for name in self.stitched]

    def _refuse_checkpointing(self) -> None:
        for module in self.trunk.modules() if torch.is_grad_enabled() else ():
            flags = vars(module)
            if flags.get("grad_checkpointing") or (flags.get("gradient_checkpointing") and module.training):
                raise RuntimeError(
                    "stitched networks cannot checkpoint activations: recomputed in backward, one network would run "
                    "without the others. Switch gradient checkpointing off."
                )


def check_alike(towers: Sequence[Backbone], tasks: Sequence[str], layers: Sequence[str]) -> None:
    """Checks that networks can be stitched after these layers.

    Raises:
        ValueError: naming the layer, the tasks and both shapes.
    """
    if len(towers) < 2 or len(towers) != len(tasks):
        raise ValueError(f"towers need two networks or more, one task each; got {len(towers)} for {len(tasks)} tasks")
    counts = {task: list(tasks).count(task) for task in tasks}
    if len(set(counts.values())) > 1:
        raise ValueError(f"every task needs as many networks; got {counts}")
    if len(set(layers)) < len(layers):
        raise ValueError(f"a layer is stitched twice in {list(layers)}")
    for tower, task in zip(towers, tasks):
        for name in layers:
            own, theirs = (_shape(one, name) for one in (towers[0], tower))
            if own != theirs:
                raise ValueError(
                    f"layer {name!r} cannot be stitched: it gives {own} in the network of task {tasks[0]!r} and "
                    f"{theirs} in that of task {task!r}; stitch layers of equal shapes"
                )
            if name in tower._seen and tower._seen[name].calls != 1:
                raise ValueError(f"layer {name!r} runs {tower._seen[name].calls} times in one pass: stitch another one")
        if tower.dim != towers[0].dim:
            raise ValueError(
                f"pooled features have {towers[0].dim} channels in the network of task {tasks[0]!r} and {tower.dim} in "
                f"that of task {task!r}; they must agree"
            )


def in_step(
    calls: Sequence[Callable[[], Any]],
    hooks: Callable[[int, Callable[[str, Any], Any]], Sequence[Any]],
    mix: Callable[[str, Sequence[Any]], Sequence[Any]],
) -> list[Any]:
    """Runs functions side by side; at each meeting all wait for the last one and go on with what `mix` gives them.

    They are coroutines of one thread (greenlets), so that gradient mode, autocast and random numbers are those of the
    caller, and they always run in the same order.

    Args:
        calls: Functions that run networks.
        hooks: ``hooks(number, meet)`` puts hooks into network `number`, each of which returns ``meet(name, value)``;
            it returns their handles.
        mix: ``mix(name, values)`` gives one new value for each network.

    Raises:
        ImportError: without the package greenlet.
        RuntimeError: if the networks do not reach the same meetings in the same order.
    """
    try:
        from greenlet import getcurrent, greenlet
    except ImportError as error:
        raise ImportError("stitched networks need greenlet: pip install 'hubtransfer[stitch]'") from error
    here = getcurrent()
    handles: list[Any] = []
    runs = [greenlet(call) for call in calls]
    try:
        for number in range(len(calls)):
            handles += hooks(number, lambda name, value: here.switch((name, value)))
        states = [run.switch() for run in runs]
        while not all(run.dead for run in runs):
            places = {None if run.dead else state[0] for run, state in zip(runs, states)}
            if len(places) > 1:
                raise RuntimeError(f"networks cannot be stitched: at one moment they are at different layers, {places}")
            values = mix(str(states[0][0]), [value for _, value in states])
            states = [run.switch(value) for run, value in zip(runs, values)]
        return states
    finally:
        for handle in handles:
            handle.remove()
        for run in runs:
            if run and not run.dead:
                run.throw()  # runs its own `finally` blocks


def _shape(tower: Backbone, name: str) -> tuple[Any, ...]:
    info = tower.layer(name)
    seen = tower._seen.get(name)
    return (info.kind, info.channels, *((seen.shape or ())[1:] if seen is not None else ()))


def _with_tensor(output: Any, old: Tensor | None, new: Tensor) -> Any:
    """The output of a layer with another tensor in its place; tuples keep what else they hold."""
    if output is old:
        return new
    if type(output) is tuple:
        return tuple(_with_tensor(part, old, new) if part is old else part for part in output)
    raise ValueError(f"a layer that gives a {type(output).__name__} cannot be stitched; choose one that gives a tensor")

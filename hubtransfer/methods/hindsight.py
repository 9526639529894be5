"""Inputs on which a model would forget most, found in hindsight by gradient ascent."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from hubtransfer.methods.evaluating import evaluating
from hubtransfer.methods.replay_method import ReplayMethod
from hubtransfer.models import TransferModel


def after_rehearsal(method: ReplayMethod, names: Sequence[str], lr: float, batch_size: int) -> TransferModel:
    """Returns a copy of a method's model, in evaluation mode, after one more pass of gradient descent over its memory.

    Args:
        method: Its model stays as it is.
        names: Of the parameters that move.
        lr: Learning rate.
        batch_size: Examples a step, in an order that the memory's seed and the item of the stream fix.
    """
    tuned = copy.deepcopy(method.model).eval().requires_grad_(True)
    parameters = [p for name, p in tuned.named_parameters() if name in names]
    order = torch.randperm(len(method.memory), generator=method.memory.random("rehearsal", method.number))
    for slots in order.split(batch_size):
        replay = method.memory.at(slots)
        loss = tuned(**replay.inputs, labels=method.labels(replay), task=method.task_of(replay)).loss
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients):
                if gradient is not None:
                    parameter.sub_(lr * gradient)
    return tuned


def ascend(
    model: TransferModel,
    later: TransferModel,
    task: str,
    inputs: Tensor,
    labels: Tensor,
    near: Tensor,
    *,
    gamma: float,
    lr: float,
    steps: int,
) -> Tensor:
    r"""Returns inputs moved uphill on :math:`L(later(e), y) - L(model(e), y) - \gamma \|f(e) - \phi\|_2^2`.

    Args:
        model: f and its head; evaluated in evaluation mode.
        later: The model after it has forgotten something.
        task: Whose head answers.
        inputs: e at the start, (anchors, ...).
        labels: y, (anchors,).
        near: phi, (features,).
        gamma: Weight of the distance.
        lr: Learning rate.
        steps: Steps.
    """
    for _ in range(steps):
        inputs = inputs.detach().requires_grad_()
        with evaluating(model):
            now, then = (each(pixel_values=inputs, labels=labels, task=task) for each in (model, later))
        forgotten = len(labels) * (then.loss - now.loss)  # losses are means: a sum leaves each input its own gradient
        height = forgotten - gamma * (now.features.pooled - near).square().sum()
        (uphill,) = torch.autograd.grad(height, [inputs])
        inputs = inputs + lr * uphill
    return inputs.detach()

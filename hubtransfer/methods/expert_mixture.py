"""A classifier that is a mixture of experts, each of which knows how likely an input is and what its class is."""

import math
from typing import Any

import torch
from torch import Tensor

from hubtransfer.data import Batch
from hubtransfer.data.seeds import seed_of, seeded
from hubtransfer.methods.continual_method import ContinualMethod
from hubtransfer.methods.scholar import need_one_shape
from hubtransfer.models import EvidenceHead, TransferModel
from hubtransfer.patches import ColumnConfig

NEW = "new expert inputs"


class ExpertMixture(ContinualMethod):
    r"""A mixture whose experts are parts of the model, and are saved with it; which of them learn what, a method says.

    .. math:: p(y | x) \propto \sum_k n_k\, p_k(x)\, p_k(y | x)

    with p_k(x) an expert's autoencoder (its evidence lower bound), p_k(y | x) its classifier and n_k how many examples
    it has learned. The first expert's classifier is the model's trunk and head, each later one a column that hears the
    earlier ones (`ColumnConfig`). One more autoencoder, which never learns, says how likely an input is to a new one.

    Args:
        model: The model, with one head of classes; it gets the experts.
        config: Of the method, with the autoencoders' `hidden`, `latent` and `samples` and the rates `generator_lr` and
            `classifier_lr`.
        task: Task of the head (default: the active one).

    """

    def __init__(self, model: TransferModel, config: Any, *, task: str | None = None) -> None:
        super().__init__(model, config, task=task)
        self.size = math.prod(need_one_shape(self))  # numbers of an input
        if NEW not in model.tasks:
            self.add_density(NEW, 0)

    @property
    def experts(self) -> list[str]:
        """Names of the tasks that are the experts' classifiers."""
        names = [self.task, *(f"expert-{k}" for k in range(1, len(self.model.tasks)))]
        return [name for name in names if f"{name} inputs" in self.model.tasks]

    @property
    def learned_by(self) -> Tensor:
        """How many examples each expert has learned, n, (experts,)."""
        counts = [self.density(f"{name} inputs").learned for name in self.experts]
        return torch.stack(counts) if counts else torch.zeros(0)

    def count(self, examples: Tensor) -> None:
        """Adds to how many examples each expert has learned, (experts,)."""
        for name, number in zip(self.experts, examples):
            self.density(f"{name} inputs").learned += number

    def add_density(self, name: str, number: int) -> None:
        """Gives the model an autoencoder."""
        chosen = self.config
        head = EvidenceHead(self.size, hidden=chosen.hidden, latent=chosen.latent, samples=chosen.samples)
        with seeded(seed_of("autoencoder", number)):
            self.model.add_task(name, head).set_task(self.task)

    def add_expert(self) -> None:
        """Gives the model another expert, which has learned nothing yet."""
        number, earlier = len(self.experts), self.experts
        name = f"expert-{number}" if number else self.task
        if number > 0:
            first = self.model.tasks[self.task].head
            with seeded(seed_of("expert", number)):
                patch = ColumnConfig(columns=tuple(earlier[1:]), seed=number)
                self.model.add_task(name, first, patch=patch).set_task(self.task)
        self.add_density(f"{name} inputs", number + 1)

    def groups(self) -> dict[str, Any]:
        """The newest expert's classifier, `model`, and autoencoder, `generator`; and both of each expert, by its name.

        The parts that an expert hears of earlier ones are not among its own.
        """
        if not self.experts:
            return super().groups()
        scale, model = self.config.generator_lr / self.config.classifier_lr, self.model
        classifiers = [model.trainable("patch" if name in model.patches else "all", name) for name in self.experts]
        densities = [list(self.density(f"{name} inputs").parameters()) for name in self.experts]
        both = [[*one, {"params": two, "lr_scale": scale}] for one, two in zip(classifiers, densities)]
        return {"model": classifiers[-1], "generator": densities[-1], **dict(zip(map(group_of, self.experts), both))}

    def density(self, name: str) -> Any:
        """Returns an autoencoder."""
        return self.model.heads[name]

    def evidence(self, inputs: Tensor) -> Tensor:
        """Returns ln p_k(x) of each expert, (batch, experts)."""
        return torch.stack([self.density(f"{name} inputs")(inputs) for name in self.experts], 1)

    def answers(self, batch: Batch) -> Tensor:
        """Returns ln p_k(y | x) of each expert, (batch, experts, classes)."""
        logits = torch.stack([self.model(**batch.inputs, task=name).logits for name in self.experts], 1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(2)

    def predict(self, batch: Batch, task: str) -> Tensor:
        """Returns the mixture's ln p(x, y), (batch, classes); of the head alone while there is no expert."""
        if task != self.task or not self.experts:
            return super().predict(batch, task)
        joint = self.learned_by.log() + self.evidence(batch.inputs["pixel_values"])
        return (joint[:, :, None] + self.answers(batch)).logsumexp(1)


def group_of(expert: str) -> str:
    """Returns the name of the group in which an expert learns whole, classifier and autoencoder."""
    return f"learner {expert}"

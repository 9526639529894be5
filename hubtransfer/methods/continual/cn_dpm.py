"""The continual neural Dirichlet process mixture (Lee et al., 2020)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hubtransfer.data import Batch, Ring, Source, TaskStream
from hubtransfer.data.noise import Noise
from hubtransfer.data.processes import everywhere, world
from hubtransfer.data.seeds import seed_of
from hubtransfer.data.table_views import Rows
from hubtransfer.functional.missing import known_classes
from hubtransfer.methods.expert_mixture import NEW, ExpertMixture, group_of
from hubtransfer.methods.importance import need_classes
from hubtransfer.methods.scholar import span_of
from hubtransfer.methods.stage import Stage, constant_adam
from hubtransfer.methods.update import Accumulate, Descend, Terms
from hubtransfer.models import EvidenceHead, TransferModel

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime

LEAST_SHARE = 0.1
"""Examples of a batch that an expert needs, in sum of its shares, to take a step."""


@dataclass(frozen=True, kw_only=True)
class CNDPMConfig:
    """Hyper-parameters of `CNDPM`.

    Attributes:
        log_alpha: Logarithm of the concentration: how readily an example is called new.
        memory: Examples in the short-term memory that make it fall asleep, at the end of a portion.
        portion: Examples of the stream between two looks at the memory (default: as many as fill it).
        generator_steps: Steps in which a new expert's autoencoder learns from the memory.
        classifier_steps: The like for its classifier.
        sleep_batch: Examples of each of these steps, of all processes together.
        chill: Temperature of the classifiers where experts compete for an example: small lets labels decide.
        generator_lr: Learning rate of Adam for autoencoders.
        classifier_lr: The like for classifiers.
        hidden: Units of the autoencoders' hidden layers.
        latent: Numbers of their codes.
        samples: Codes drawn for an input.
    """

    log_alpha: float = -400.0
    memory: int = 500
    portion: int | None = None
    generator_steps: int = 8000
    classifier_steps: int = 2000
    sleep_batch: int = 50
    chill: float = 0.01
    generator_lr: float = 4e-4
    classifier_lr: float = 1e-4
    hidden: tuple[int, ...] = (64, 64)
    latent: int = 16
    samples: int = 16

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        EvidenceHead(1, hidden=self.hidden, latent=self.latent, samples=self.samples)
        for name in ("memory", "generator_steps", "classifier_steps", "sleep_batch", "portion"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("chill", "generator_lr", "classifier_lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class CNDPM(ExpertMixture, name="cn_dpm", config=CNDPMConfig):
    r"""A mixture that grows: each expert knows how likely an input is, and what its class is.

    .. math:: p(y | x) \propto \sum_k n_k\, p_k(x)\, p_k(y | x), \qquad
       z(x, y) = \arg\max_k \begin{cases} n_k\, p_k(x)\, \tilde p_k(y | x) & k = 1 \dots K \\
       \alpha\, p_0(x) & \text{new} \end{cases}

    with p_k(x) an expert's autoencoder (its evidence lower bound), p_k(y | x) its classifier, tilde p_k the
    classifier at temperature tau (p_k^(1 / tau), made to sum to one over the classes), n_k how many examples it has
    learned, and p_0 an autoencoder that never learned. Awake, an example that is new goes into a short-term memory;
    any other one trains the experts, each by its share n_k p_k(x) tilde p_k(y | x). Once the memory is full, it falls
    asleep: a new expert learns from the memory, which is then emptied. What an expert is made of says
    `ExpertMixture`. Boundaries are neither needed nor used: streams of kind "class" and "domain", a blurred one too;
    images or vectors of one size.

    Args:
        model: The model, with one head of classes; it gets the experts.
        task: Task of that head (default: the active one).

    Differs from the paper: whether to sleep is asked after each portion, so that the memory may hold more than its
    size; autoencoders do not share layers; optimisers start afresh with each portion; examples on their way into the
    memory count for no expert (the authors' code counts them). The temperature is the authors' code's.

    Source: https://arxiv.org/abs/2001.00689, section 3; numbers of the authors' code.
    """

    paper = "Lee 2020"
    source = "https://arxiv.org/abs/2001.00689"
    citation = """@inproceedings{lee2020neural,
  title = {A Neural {Dirichlet} Process Mixture Model for Task-Free Continual Learning},
  author = {Lee, Soochan and Ha, Junsoo and Zhang, Dongsu and Kim, Gunhee},
  booktitle = {International Conference on Learning Representations},
  year = {2020}
}"""

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)
        self.portion = self.config.portion or self.config.memory
        self.memory = Ring(self.config.memory + self.portion, groups=1).build(model.processor)
        self.noise, self.usage = Noise(), torch.zeros(0)

    def checked(self, scenario: TaskStream) -> list[Any]:
        """Checks that the stream has a length, and one head of classes."""
        items = need_classes(self, super().checked(scenario), "an expert")
        if scenario.kind == "task":
            raise ValueError("CNDPM finds an example's expert itself; make the stream of kind 'class' or 'domain'")
        for item in items:
            if item.train_source.iterable:
                raise ValueError(f"CNDPM reads {item.train_source.where} in portions, which needs data of known length")
        return items

    def stages(self, scenario: TaskStream) -> Iterator[Stage]:
        """For each portion a wake stage, and two of sleep when the memory is full."""
        chosen, full = self.config, self.is_full
        adam = {"generator": constant_adam(chosen.generator_lr)}, {"model": constant_adam(chosen.classifier_lr)}
        for item in self.checked(scenario):
            for number, data in enumerate(self.portions(item)):
                name, begin = f"{item.name}/{number}", partial(self.begin, item) if number == 0 else None
                awake: list[Any] = [Accumulate(self.place)]
                for k, expert in enumerate(self.experts):
                    loss, when = partial(self.share_loss, k), partial(self.learns, k)
                    awake.append(Descend(loss, trains=group_of(expert), when=when))
                adams = {group_of(expert): constant_adam(chosen.classifier_lr) for expert in self.experts}
                yield Stage(f"{name} awake", data, awake, epochs=1, enter=begin, optimizers=adams)
                see, tell = [Descend(self.generator_loss, trains="generator")], [Descend(self.classifier_loss)]
                yield Stage(
                    f"{name} asleep, inputs",
                    data,
                    see,
                    steps=chosen.generator_steps,
                    enter=self.fall_asleep,
                    when=full,
                    optimizers=adam[0],
                    measured=False,
                )
                yield Stage(
                    f"{name} asleep, labels",
                    data,
                    tell,
                    steps=chosen.classifier_steps,
                    exit=self.wake_up,
                    when=full,
                    optimizers=adam[1],
                )

    def portions(self, item: Any) -> Iterator[Source]:
        """Yields an item's data in portions, in random order unless they are a stream."""
        source = item.train_source
        order = torch.arange(len(source.table))
        if source.shuffle:
            seed = seed_of("portions", self.memory.seed, item.name)  # the memory has the run's
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))
        for rows in order.split(self.portion):
            yield replace(source, dataset=Rows(source.table, rows), shuffle=False)

    def before_task(self, item: Any, runtime: "Runtime") -> None:
        """Scales inputs as those of the first item lie."""
        if self.number == 0:
            self.noise.seed = runtime.arguments.seed
            self.density(NEW).span.copy_(span_of(self, item, runtime))

    @torch.no_grad()
    def judged(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Says which examples are new, bool (batch,), whose the others are, (batch, experts), and ln of the maximum.

        Those without a label are nobody's.
        """
        inputs, (labels, known) = batch.inputs["pixel_values"], self.labelled(batch)
        new = self.config.log_alpha + self.density(NEW)(inputs)
        if not self.experts:
            return known, inputs.new_zeros(len(batch), 0), new
        chilled = (self.answers(batch) / self.config.chill).log_softmax(2)
        joint = self.learned_by.log() + self.evidence(inputs)
        joint = joint + chilled.gather(2, labels[:, None, None].expand(-1, joint.shape[1], 1))[:, :, 0]
        is_new, best = new > joint.amax(1), torch.maximum(new, joint.amax(1))
        return is_new & known, joint.softmax(1).masked_fill((is_new | ~known)[:, None], 0).to(inputs), best

    @torch.no_grad()
    def place(self, batch: Batch) -> Terms:
        """Puts what is new into the memory and counts who learns the rest; returns minus the log of p, `evidence`."""
        is_new, shares, best = batch.once("judged", lambda: self.judged(batch))
        self.usage = everywhere(shares).sum(0)
        self.count(self.usage)
        keep = everywhere(is_new)
        everyone = Batch({n: everywhere(v) for n, v in batch.inputs.items()}, everywhere(self.labels(batch)))
        if keep.any():
            self.memory.add(everyone.rows(keep), same=True)
        return {"evidence": -masked_mean(best, self.labelled(batch)[1])}

    def labelled(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns labels, class 0 where there is none, and which there are, (batch,) both."""
        known = known_classes(self.labels(batch))
        return self.labels(batch).long().where(known, 0), known

    def learns(self, number: int, runtime: "Runtime") -> bool:
        """Whether an expert has a share worth a step."""
        return float(self.usage[number]) > LEAST_SHARE

    def share_loss(self, number: int, batch: Batch) -> Terms:
        """Returns an expert's mean loss by its shares: the scalars `inputs` and `labels`."""
        inputs, name = batch.inputs["pixel_values"], self.experts[number]
        shares = batch.once("judged", lambda: self.judged(batch))[1][:, number]
        noise = self.noise.normal(len(batch), self.config.samples, self.config.latent, like=inputs)
        bounds = self.density(f"{name} inputs")(inputs, noise)
        logits = self.model(**batch.inputs, task=name).logits
        labels, known = self.labelled(batch)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return {"inputs": -masked_mean(shares * bounds, known), "labels": masked_mean(shares * losses, known)}

    def is_full(self) -> bool:
        """Whether it is time to sleep."""
        return len(self.memory) >= self.config.memory

    def fall_asleep(self, runtime: "Runtime") -> None:
        """Grows an expert."""
        self.grow("add_expert")
        self.density(f"{self.experts[-1]} inputs").span.copy_(self.density(NEW).span)

    def generator_loss(self, batch: Batch) -> Terms:
        """Returns the negative evidence of what is in the memory, for the newest expert: the scalar `inputs`."""
        inputs = self.recalled().inputs["pixel_values"]
        noise = self.noise.normal(len(inputs), self.config.samples, self.config.latent, like=inputs)
        return {"inputs": -self.density(f"{self.experts[-1]} inputs")(inputs, noise).mean()}

    def classifier_loss(self, batch: Batch) -> Terms:
        """Returns the newest expert's loss on what is in the memory: the scalar `labels`."""
        drawn = self.recalled()
        return {"labels": self.model(**drawn.inputs, labels=drawn.labels, task=self.experts[-1]).loss}

    def recalled(self) -> Batch:
        """Returns examples of the memory."""
        drawn = self.memory.draw(max(1, self.config.sleep_batch // world()))
        assert drawn is not None
        return drawn

    def wake_up(self, runtime: "Runtime") -> None:
        """Counts what the newest expert has learned, and empties the memory."""
        self.density(f"{self.experts[-1]} inputs").learned += len(self.memory)
        self.memory.drop(torch.arange(len(self.memory)))


def masked_mean(values: Tensor, known: Tensor) -> Tensor:
    """Returns the mean of the values that are known, a scalar; 0 of none."""
    return values.where(known, 0).sum() / known.sum().clamp(min=1)

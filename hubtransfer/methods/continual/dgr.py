"""Deep generative replay (Shin et al., 2017)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hubtransfer.data import Batch, TaskStream
from hubtransfer.data.seeds import seed_of
from hubtransfer.functional.distributions import softened_kl
from hubtransfer.methods.continual_method import ContinualMethod
from hubtransfer.methods.earlier_model import EarlierModel
from hubtransfer.methods.generative_memory import GenerativeMemory
from hubtransfer.methods.importance import need_classes
from hubtransfer.methods.item_batches import need_ends
from hubtransfer.methods.scholar import need_one_shape, restart, span_of
from hubtransfer.methods.stage import Stage, constant_adam
from hubtransfer.methods.update import Descend, Terms
from hubtransfer.models import TransferModel
from hubtransfer.models.generators import VAE, GeneratorConfig

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


GENERATOR = VAE()
"""What recalls the past unless another kind is asked for."""


@dataclass(frozen=True, kw_only=True)
class DGRConfig:
    """Hyper-parameters of `DGR`.

    Attributes:
        generator: What draws the replayed inputs.
        new: r, the weight of new data (default: 1/t at the t-th task); 0 learns from the earlier scholar alone.
        temperature: T, with which the earlier solver's answers are class probabilities, as van de Ven and Tolias (2018)
            have them with T = 2 (default: each answer is the most probable class).
        generator_epochs: Passes over a task's data in which the generator learns (default: as the training arguments).
        restart: Whether the scholar of each task starts from new weights and knows only what it is taught.
    """

    generator: GeneratorConfig = GENERATOR
    new: float | None = None
    temperature: float | None = None
    generator_epochs: float | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if not isinstance(self.generator, GeneratorConfig):
            raise ValueError(f"generator must be a kind of generator such as VAE(), got {self.generator!r}")
        if self.new is not None and not 0 <= self.new <= 1:
            raise ValueError(f"new must lie in [0, 1], got {self.new}")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.generator_epochs is not None and self.generator_epochs <= 0:
            raise ValueError(f"generator_epochs must be positive, got {self.generator_epochs}")


class DGR(ContinualMethod, name="dgr", config=DGRConfig):
    r"""Learns each task beside inputs that a generator recalls and the solver of the time before answers.

    .. math:: L_{solver} = r\, E_{(x, y) \sim D_t} L(S(x), y) + (1 - r)\, E_{x' \sim G_{t-1}} L(S(x'), S_{t-1}(x'))

    A scholar is a solver S (the model) and a generator G, which learns to draw new inputs with probability r and those
    of the generator before with 1 - r. Replayed inputs, as many as the batch has, get the class that the earlier solver
    finds most probable, from each earlier task's head where heads differ. Nothing of the old data is kept. With a
    temperature T the earlier solver's logits v are imitated instead,
    :math:`L = T^2\, KL(\mathrm{softmax}(v / T) \,\|\, \mathrm{softmax}(z / T))` (https://arxiv.org/abs/1809.10635).

    Applies to streams of every kind, to images (batch, channels, height, width) or vectors of one size, heads that
    predict classes; penalties join the solver's loss with `+`. Inputs are scaled so that those of the first task lie in
    [0, 1]; what later ones have beyond is cut off.

    Args:
        model: The model, with a head for each of the stream's tasks (kind "task") or one head.
        task: Task of a stream that names none (default: the active one).

    Differs from the paper: first the generator learns a task, then the solver; generators are perceptrons unless
    they are given convolutions; heads of earlier tasks stay as they are.

    Source: https://arxiv.org/abs/1705.08690, section 3.1, equation 1.
    """

    paper = "Shin 2017"
    source = "https://arxiv.org/abs/1705.08690"
    citation = """@inproceedings{shin2017continual,
  title = {Continual Learning with Deep Generative Replay},
  author = {Shin, Hanul and Lee, Jung Kwon and Kim, Jaehong and Kim, Jiwon},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2017}
}"""

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)
        self.past = GenerativeMemory(self.config.generator, need_one_shape(self))
        self.solver_before = EarlierModel()

    def checked(self, scenario: TaskStream) -> list[Any]:
        """Checks the stream's heads too."""
        return need_classes(self, need_ends(self, super().checked(scenario)), "answering replayed inputs")

    def groups(self) -> dict[str, Any]:
        """The solver's group `model`, and the generator's parts."""
        return {**super().groups(), **{name: player.part for name, player in self.past.generator.players().items()}}

    def stages(self, scenario: TaskStream) -> Iterator[Stage]:
        """Two stages an item: the generator's and the solver's."""
        for item in self.checked(scenario):
            begin, end, data = partial(self.begin, item), self.ending(item), item.train_source
            players, epochs = self.past.generator.players(), self.config.generator_epochs
            learn = [
                Descend(partial(self.generator_loss, name), trains=name, repeat=player.steps)
                for name, player in players.items()
            ]
            adams = {name: constant_adam(player.lr, player.betas) for name, player in players.items()}
            first = f"{item.name}/generator"
            yield Stage(first, data, learn, epochs=epochs, enter=begin, optimizers=adams, measured=False)
            yield Stage(f"{item.name}/solver", data, self.updates(), exit=end)

    @property
    def share(self) -> float:
        """r, the weight of new data in the current task."""
        first, chosen = self.number < 1, self.config.new
        return 1.0 if first else 1 / (self.number + 1) if chosen is None else chosen

    def generator_loss(self, name: str, batch: Batch) -> Terms:
        """Returns the loss of one of the generator's parts: a scalar of its name."""
        return {name: self.past.loss(name, batch.inputs["pixel_values"], self.share)}

    def loss(self, batch: Batch) -> Terms:
        """Returns the scalars `labels`, of new examples, and `replayed`, each times its weight."""
        terms: Terms = {}
        if self.share > 0:
            terms["labels"] = self.share * self.label_loss(batch)
        if self.share < 1:
            given = {"pixel_values": self.past.recall(len(batch), like=batch.inputs["pixel_values"])}
            tasks = list(dict.fromkeys(self.learned_tasks[:-1]))
            answers = self.solver_before.outputs(
                self.model,
                Batch(given, changing="replayed inputs are generated anew"),
                lambda model, x: tuple(model(**x, task=t).logits for t in tasks),
            )
            losses = [self.answer_loss(given, t, logits) for t, logits in zip(tasks, answers)]
            terms["replayed"] = (1 - self.share) * torch.stack(losses).mean()
        return terms

    def answer_loss(self, inputs: dict[str, Tensor], task: str, earlier: Tensor) -> Tensor:
        """Returns how far a head is from the earlier solver's answers, logits (batch, classes): a scalar."""
        temperature = self.config.temperature
        if temperature is None:
            return self.model(**inputs, labels=earlier.argmax(1), task=task).loss
        return temperature**2 * softened_kl(earlier, self.model(**inputs, task=task).logits, temperature)

    def before_task(self, item: Any, runtime: "Runtime") -> None:
        """Makes the scholar so far the earlier one."""
        self.past.noise.seed = runtime.arguments.seed
        if self.number == 0:
            self.past.span.copy_(span_of(self, item, runtime))
            return
        self.solver_before.hold(self.model)
        self.past.hold()
        if self.config.restart:
            restart([self.model, self.past.generator], seed_of("scholar", runtime.arguments.seed, self.number))

"""From named loss terms to one gradient for each parameter."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass

Gradients = list[Tensor]


class Combine(ABC):
    """Turns the terms of a loss into one gradient for each parameter of a group."""

    @abstractmethod
    def from_rows(self, rows: Sequence[Gradients], losses: Tensor) -> Gradients:
        """Combines gradients by term.

        Args:
            rows: For each term the gradients of every parameter, averaged over processes.
            losses: Values of the terms, (terms,), averaged over processes.

        Returns:
            One gradient for each parameter.
        """

    def weighing(self) -> "Combine | None":
        """Returns the rule by which terms are weighed against one another, `None` where further ones, first, add up."""
        return self


class Sum(Combine):
    """The gradient of the sum of all terms. The only combination that Accelerate's own engine can run."""

    def weighing(self) -> Combine | None:
        """Returns `None`; a subclass may weigh."""
        return None if type(self) is Sum else self

    def from_rows(self, rows: Sequence[Gradients], losses: Tensor) -> Gradients:
        """Adds the rows up."""
        return [torch.stack(column).sum(0) for column in zip(*rows)]


class Aggregator(Combine):
    """A function of the whole Jacobian: GEM, A-GEM, PCGrad and the like differ only in `aggregate`."""

    @abstractmethod
    def aggregate(self, jacobian: Tensor) -> Tensor:
        """Maps one gradient a term, (terms, parameters), to one gradient, (parameters,)."""

    def from_rows(self, rows: Sequence[Gradients], losses: Tensor) -> Gradients:
        """Flattens the rows, aggregates them and gives the result the parameters' shapes back."""
        flat = self.aggregate(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
        pieces = flat.split([g.numel() for g in rows[0]])
        return [piece.view_as(g) for piece, g in zip(pieces, rows[0])]


class GramAggregator(Combine):
    """A weighted sum whose weights depend on inner products of the gradients alone: MGDA and its relatives.

    The Gram matrix is summed up one parameter at a time, so that no row is ever flattened or copied.
    """

    @abstractmethod
    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """Maps the Gram matrix, (terms, terms), and the loss values, (terms,), to weights, (terms,)."""

    def from_rows(self, rows: Sequence[Gradients], losses: Tensor) -> Gradients:
        """Returns the weighted sum of the rows."""
        columns = [torch.stack(column).flatten(1) for column in zip(*rows)]
        gram = torch.stack([(column @ column.T).double() for column in columns]).sum(0)
        weights = self.weights(gram, losses)
        return [(weights.to(c) @ c).view_as(g) for c, g in zip(columns, rows[0])]

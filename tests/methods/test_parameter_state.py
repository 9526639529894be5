"""Tensors by parameter: copies, zeros for what is new, and loading into an empty one."""

import pytest
import torch

from hubtransfer.methods.parameter_state import ParameterState


def test_what_is_kept_is_a_copy():
    value = torch.ones(2)
    state = ParameterState()
    state.keep({"a.b": value})
    value.zero_()
    assert state.tensors()["a.b"].tolist() == [1, 1]
    assert "a.b" in state and "a" not in state and list(state) == ["a.b"] and len(state) == 1


def test_grown_parameters_get_zeros_at_the_end_of_each_axis():
    state = ParameterState()
    state.keep({"w": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0])})
    assert state.like("w", torch.empty(2, 3)).tolist() == [[1, 2, 0], [0, 0, 0]]
    assert state.like("b", torch.empty(3)).tolist() == [3, 0, 0]
    assert state.like("never", torch.empty(1, 2)).tolist() == [[0, 0]]


def test_a_checkpoint_replaces_what_is_there():
    state, other = ParameterState(), ParameterState()
    state.keep({"heads.a.weight": torch.ones(2), "x": torch.zeros(1)})
    other.keep({"y": torch.zeros(3)})
    other.load_state_dict(state.state_dict())
    assert list(other) == ["heads.a.weight", "x"]
    other.tensors()["x"].add_(1)
    assert state.tensors()["x"].item() == 0
    other.load_state_dict(ParameterState().state_dict())
    assert not other


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_an_empty_state_that_was_moved_loads_to_where_it_is():
    kept, owner = ParameterState(), torch.nn.Module()
    kept.keep({"a.b": torch.ones(2)})
    owner.state = ParameterState()
    owner.to("meta")  # stands for a GPU
    owner.state.load_state_dict(kept.state_dict())
    assert owner.state.tensors()["a.b"].device.type == "meta"


def test_names_with_any_sign_come_back():
    names = ["heads.a:0.weight", "heads.a.0.weight", "heads.a%3a0.weight", "heads.100%.bias"]
    state = ParameterState()
    state.keep({name: torch.full((2,), float(k)) for k, name in enumerate(names)})
    other = ParameterState()
    other.load_state_dict(state.state_dict())
    assert {name: value[0].item() for name, value in other.tensors().items()} == dict(zip(names, (0.0, 1.0, 2.0, 3.0)))

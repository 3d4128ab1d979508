"""Registration: what torch derives from an operator besides running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from masklake.model.kernels import operators


def _distance_from_ten(values: Tensor) -> Tensor:
    return values - 10 if values.sum() > 10 else 10 - values  # a choice that no graph can hold


@pytest.fixture(scope="module")
def operator() -> Callable[[Tensor], Tensor]:
    return operators.register(_distance_from_ten, torch.empty_like)


def test_it_is_one_of_torchs_own(operator: Callable[[Tensor], Tensor]) -> None:
    assert torch.equal(torch.ops.masklake.distance_from_ten(torch.tensor([3.0])), torch.tensor([7.0]))
    torch.library.opcheck(operator, (torch.ones(3),))


def test_a_graph_holds_it_and_the_compiler_leaves_its_inside_alone(operator: Callable[[Tensor], Tensor]) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def not_in_a_graph(values: Tensor) -> Tensor:
        for _ in range(2):  # a break in a loop, and the whole function runs as it is
            torch._dynamo.graph_break()
            values = operator(values)
        return values

    torch.compiler.reset()
    whole = torch.compile(lambda x: operator(x + 1) * 2, backend=backend, fullgraph=True)
    assert whole(torch.tensor([2.0])) == 14
    assert whole(torch.tensor([20.0])) == 22
    assert len(graphs) == 1
    assert torch.compile(not_in_a_graph, backend=backend)(torch.tensor([4.0])) == 4
    assert len(graphs) == 1


def test_without_a_derivative_it_says_so(operator: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotImplementedError, match="masklake::distance_from_ten cannot be differentiated"):
        operator(torch.ones(1, requires_grad=True)).sum().backward()

"""Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1), with state that can be written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from quern.core.machine.parallel import Workers

BETAS = 0.9, 0.95
EPSILON = 1e-12
"""Far below the gradients of a mean over tokens, so that their size does not matter."""


class Adam:
    """Steps of parameters by name."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], workers: Workers) -> None:
        self._parameters, self._workers = dict(parameters), workers
        self._first = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
        self._second = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}

    def state(self) -> dict[str, Tensor]:
        """Both moments, by name."""
        first = {f"first {name}": tensor for name, tensor in self._first.items()}
        return {**first, **{f"second {name}": tensor for name, tensor in self._second.items()}}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of ``state``."""
        self._first = {name: state[f"first {name}"] for name in self._first}
        self._second = {name: state[f"second {name}"] for name in self._second}

    def step(self, number: int, rate: Callable[[str], float]) -> None:
        """The step called ``number``, from 1 on, by the parameters' gradients; ``rate``: of each name."""
        by_first, by_second = (1 - beta**number for beta in BETAS)

        @torch.no_grad()
        def one(name: str) -> None:
            parameter = self._parameters[name]
            if (gradient := parameter.grad) is None:
                return
            first, second = self._first[name], self._second[name]
            first.mul_(BETAS[0]).add_(gradient, alpha=1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            size = (second / by_second).sqrt_().add_(EPSILON)
            parameter.sub_(first / size, alpha=rate(name) / by_first)
            parameter.grad = None

        self._workers.map(one, list(self._parameters))

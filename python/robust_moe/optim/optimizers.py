"""Optimisers. One is a class in :data:`OPTIMIZERS` that owns its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from robust_moe.optim.parameter_groups import parameter_groups
from robust_moe.optim.schedules import Polynomial, Schedule
from robust_moe.settings import Config, ConfigError, Table, setting

__all__ = ["OPTIMIZERS", "SGD", "Adam", "AdamW", "OptimizerConfig", "PyTorchConfig", "keep_with_parameters"]

OPTIMIZERS = Table("optimiser")

OF_THE_TRAINER = ("weight_decay_on", "schedule", "warmup_epochs", "grad_clip")  # settings that no constructor takes


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """What every optimiser has; it is stepped once for each update, at the rate of the schedule.

    A new optimiser is a subclass of :class:`torch.optim.Optimizer` that nests a subclass of this and is registered in
    :data:`OPTIMIZERS`. Its constructor takes parameter groups, ``lr``, ``weight_decay`` and, by name, its own settings.
    """

    table: ClassVar[Table] = OPTIMIZERS
    state_size: ClassVar[int] = 2  # numbers that it keeps for each weight, for the memory that --dry-run tells

    lr: float = setting(0.1, "peak learning rate", above=0)
    weight_decay: float = setting(5e-4, "an L2 penalty; of adamw apart from the gradient", at_least=0)
    weight_decay_on: Literal["all", "weights"] = setting(
        "all", "all parameters; or weights: filters and matrices, no norm, bias, gate or router"
    )
    schedule: Schedule.Config = setting(Polynomial.Config(), "how the rate changes after the warm-up")
    warmup_epochs: float = setting(0.0, "of linear rise from zero", unit="epochs", at_least=0)
    grad_clip: float | None = setting(None, "largest global gradient norm; null: no clipping", above=0)

    def check(self) -> None:
        try:
            self.schedule.expect_peak(self.lr)
        except ConfigError as error:
            raise ConfigError(f"schedule.{error}") from error

    def build(self, model: nn.Module, fused: bool = False) -> torch.optim.Optimizer:
        """The optimiser for every parameter of ``model``; one without a gradient is left alone in a step.

        Args:
            fused: as one kernel where the optimiser has one, and not as PyTorch's foreach operations.
        """
        return self.owner(parameter_groups(model, self.weight_decay_on), **self.arguments(fused))

    def arguments(self, fused: bool) -> dict[str, Any]:
        """What the constructor takes beside the parameters: settings, and what the name decides."""
        settings = {name: value for name, value in self.values().items() if name not in OF_THE_TRAINER}
        return settings | dict(self.fixed)


@dataclass(frozen=True, kw_only=True)
class PyTorchConfig(OptimizerConfig):
    """Of an optimiser of PyTorch that runs fused or by foreach operations.

    Fused on a GPU: one kernel for all, of three reads and two writes a weight (estimated; foreach makes four passes).
    foreach on a CPU: there SGD takes 220 ms for 84 M parameters, of 366 one by one and 423 fused (measured).
    """

    def arguments(self, fused: bool) -> dict[str, Any]:
        return {**super().arguments(fused), "fused" if fused else "foreach": True}


@OPTIMIZERS.register("sgd")
class SGD(torch.optim.SGD):
    """Stochastic gradient descent."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PyTorchConfig):
        """Momentum."""

        state_size: ClassVar[int] = 1

        momentum: float = setting(0.9, "factor of the earlier updates in the next", at_least=0, below=1)
        nesterov: bool = setting(True, "Nesterov's form of momentum")

        def check(self) -> None:
            super().check()
            if self.momentum == 0 and self.nesterov:
                raise ConfigError("nesterov: expected false when momentum is 0, got true")


@dataclass(frozen=True, kw_only=True)
class AdamConfig(PyTorchConfig):
    """Averages of the gradient and of its square (Kingma and Ba, 2015, arXiv:1412.6980)."""

    betas: tuple[float, ...] = setting((0.9, 0.999), "decay of the two averages, a factor a step", at_least=0, below=1)
    eps: float = setting(1e-8, "added to the root of the average square", above=0)

    def check(self) -> None:
        super().check()
        if len(self.betas) != 2:
            raise ConfigError(f"betas: expected two factors, got {list(self.betas)}")


@OPTIMIZERS.register("adam")
class Adam(torch.optim.Adam):
    """Adam, its weight decay an L2 penalty."""

    @dataclass(frozen=True, kw_only=True)
    class Config(AdamConfig):
        """Those of both forms of Adam."""


@OPTIMIZERS.register("adamw")
class AdamW(torch.optim.AdamW):
    """Adam, its weight decay apart from the gradient (Loshchilov and Hutter, 2019, arXiv:1711.05101)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(AdamConfig):
        """Those of both forms of Adam."""


def keep_with_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Put counts of steps where the optimiser wants them: a state that was saved from foreach, which counts on the CPU,
    may go on fused, which counts on the parameters' device, and the other way round."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            step = optimizer.state[parameter].get("step") if parameter in optimizer.state else None
            if isinstance(step, Tensor):
                home = parameter.device if group.get("fused") else torch.device("cpu")
                optimizer.state[parameter]["step"] = step.to(home, torch.float32)

"""Optimizers of the weights that are trained, and their size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.config import ConfigError, OptimizerConfig
from diffalign.quantization.backends import missing_library

EIGHT_BIT = "adamw8bit"
BLOCK = 256
"""Numbers of an 8-bit moment that share a scale."""
LEAST = 4096
"""Numbers below which a weight keeps float32 moments, as in bitsandbytes."""
MAP = 256
"""Values of 8 bits, which each moment has a float32 table of."""


def check_optimizer(config: OptimizerConfig, device: torch.device | str) -> None:
    """Check that an optimizer works on a device, before a model is loaded.

    Raises:
        ConfigError: a library is missing, or the device is not supported.
    """
    if config.type != EIGHT_BIT:
        return
    missing = missing_library("torchao", "0.16")
    if missing is None and torch.device(device).type not in ("cpu", "cuda"):
        missing = f"CUDA or a CPU, this is {torch.device(device).type}"
    if missing is not None:
        raise ConfigError(
            f"needs {missing}. Set adamw instead", setting="optimizer.type", value=EIGHT_BIT
        )


def make_optimizer(
    config: OptimizerConfig, parameters: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return the configured optimizer of some parameters."""
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
        "eps": config.epsilon,
    }
    if config.type != EIGHT_BIT:
        return torch.optim.AdamW(parameters, **options)
    from torchao.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, block_size=BLOCK, **options)
    return optimizer


def notice(config: OptimizerConfig, device: torch.device | str) -> str | None:
    """Return a note about an optimizer's work on a device, or None."""
    if config.type == EIGHT_BIT and torch.device(device).type == "cpu":
        return (
            "optimizer.type=adamw8bit: a CPU takes its steps without compilation, which is slower than adamw. The "
            "moments have 8 bits all the same"
        )
    return None


def take_step(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Take an optimizer step with this learning rate."""
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(learning_rate)
    else:
        group["lr"] = learning_rate
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    # torchao compiles its step, which pays on GPUs only
    eager = isinstance(group["lr"], Tensor) and parameters[0].device.type == "cpu"
    if not eager:
        optimizer.step()
        return
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimizer as plain tensors named "index.name", by the parameter's index.

    An 8-bit moment has a tensor for each of its parts, named "index.name.part".
    """
    state = optimizer.state_dict()["state"]
    return {
        f"{i}.{name}{part}": tensor.clone()
        for i, values in state.items()
        for name, value in values.items()
        for part, tensor in _parts(torch.as_tensor(value))
    }


def restore(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimizer the state that `state_tensors` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    parts: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name, *part = key.split(".")
        if part:
            parts.setdefault((int(index), name), {})[part[0]] = value
        else:
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    for (number, moment_name), values in parts.items():
        parameter = parameters[number]
        # torchao's own empty moment knows the class and the signs
        moment = optimizer._new_buffer(parameter, moment_name == "exp_avg")  # type: ignore[attr-defined]
        for ending, tensor in _parts(moment):
            tensor.copy_(values[ending.removeprefix(".")])
        optimizer.state[parameter][moment_name] = moment


def _parts(tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain tensors of a moment with the ends of their names."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield "", tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield f".{name}", getattr(tensor, name)


def moment_bytes(parameters: Sequence[nn.Parameter], kind: str) -> int:
    """Return the bytes of two moments of each parameter.

    Args:
        kind: `optimizer.type`.
    """
    return sum(2 * _moment(p.numel(), kind) for p in parameters)


def _moment(numbers: int, kind: str) -> int:
    """Return the bytes of one moment."""
    if kind == EIGHT_BIT and numbers >= LEAST and numbers % BLOCK == 0:
        return numbers + 4 * (numbers // BLOCK) + 4 * MAP
    return 4 * numbers

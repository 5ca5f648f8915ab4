"""All policies of a run are LoRA adapters on one base: current, lagged, averaged; the reference is the base itself.

Nothing is copied but the small adapter matrices, and a policy is a context: whatever happens inside, the current
adapter is back in place and trainable afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffalign.core.errors import UsageError

CURRENT = "default"
LAGGED = "lagged"
AVERAGED = "averaged"
SAMPLER = "sampler"
REFERENCE = "reference"


def attach(
    denoiser: ModelMixin,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    seed: int = 0,
    policies: Sequence[str] = (LAGGED, AVERAGED),
) -> list[nn.Parameter]:
    """Freeze the base and add a fresh LoRA (Gaussian A, zero B) and named copies.

    The matrices are float32. Targets are suffixes of layers' names, or "=" and a whole name. Returns the trainable
    parameters. UsageError where a target matches no layer.
    """
    missing = unresolved(denoiser, targets)
    if missing:
        raise UsageError(
            f"lora.targets that match no layer of {type(denoiser).__name__}: {', '.join(missing)}. Name endings "
            "of its layers"
        )
    denoiser.requires_grad_(False)
    config = PeftLoraConfig(
        r=rank,
        lora_alpha=alpha,
        init_lora_weights="gaussian",
        target_modules=_target_modules(denoiser, targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in (CURRENT, *policies):
            denoiser.add_adapter(config, adapter_name=name)
    # the weights of blocks that are offloaded lie elsewhere than the denoiser computes
    device = denoiser.device
    for layer in _layers(denoiser):
        for part in (layer.lora_A, layer.lora_B):
            part.to(device, torch.float32)
        layer.set_adapter(CURRENT)
    for name in policies:
        blend(denoiser, name, decay=0.0)
    return trainable(denoiser)


def keep_input_dtype(denoiser: nn.Module) -> None:
    """Keep peft from copying the adapters' input to float32.

    Autocast casts the adapters' weights. With copies autograd would keep one input per adapter, where q, k and v can
    share one.
    """
    for layer in _layers(denoiser):
        layer.cast_input_dtype_enabled = False


def unresolved(denoiser: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the targets that no linear layer's or convolution's name ends with."""
    names = _matrices(denoiser)
    return [t for t in targets if not any(re.fullmatch(_pattern([t]), n) for n in names)]


def _matrices(denoiser: nn.Module) -> set[str]:
    """Return the names of the layers that can carry a LoRA."""
    kinds = nn.Linear | nn.Conv2d
    return {name for name, module in denoiser.named_modules() if isinstance(module, kinds)}


def _target_modules(denoiser: nn.Module, targets: Sequence[str]) -> str | list[str]:
    """Return the targets in peft's notation.

    They are whole names where an ending is also that of a module without weights, which peft would refuse: FLUX.2's
    `attn.to_out` is a layer in single blocks, and a list in joint blocks.
    """
    if any(map(_is_exact, targets)):
        return _pattern(targets)
    pattern = re.compile(_pattern(targets))
    matched = {name for name, _ in denoiser.named_modules() if pattern.fullmatch(name)}
    layers = matched & _matrices(denoiser)
    return list(targets) if layers == matched else sorted(layers)


def _is_exact(target: str) -> bool:
    return target.startswith("=")


def _pattern(targets: Sequence[str]) -> str:
    """Return a regular expression for the names of all layers that targets mean.

    It is for peft, whose suffixes would mean for FLUX's last layer those of all single blocks as well.
    """
    parts = (re.escape(t[1:]) if _is_exact(t) else rf"(?:.*\.)?{re.escape(t)}" for t in targets)
    return "|".join(parts)


def trainable(denoiser: nn.Module) -> list[nn.Parameter]:
    """Return the current adapter's parameters, in a fixed order."""
    return [p for _, p in adapter_parameters(denoiser, CURRENT)]


def adapter_parameters(denoiser: nn.Module, name: str) -> list[tuple[str, nn.Parameter]]:
    """Return (name, parameter) of one adapter; names are the same for every adapter."""
    named = []
    for layer_name, layer in denoiser.named_modules():
        if isinstance(layer, BaseTunerLayer):
            for part in ("lora_A", "lora_B"):
                weight = getattr(layer, part)[name].weight
                named.append((f"{layer_name}.{part}.weight", weight))
    return named


@torch.no_grad()
def blend(denoiser: nn.Module, name: str, *, decay: float) -> None:
    """theta_name <- decay * theta_name + (1 - decay) * theta_current."""
    target = [p.data for _, p in adapter_parameters(denoiser, name)]
    source = [p.data for _, p in adapter_parameters(denoiser, CURRENT)]
    torch._foreach_lerp_(target, source, 1 - decay)


@contextmanager
def policy(denoiser: nn.Module, name: str) -> Iterator[None]:
    """Use one policy inside: CURRENT, LAGGED, AVERAGED, SAMPLER or REFERENCE, the base without adapters.

    Afterwards the policy that was active before is back, so that policies can be nested.
    """
    layers = _layers(denoiser)
    before = _active(layers)
    if before == name:
        yield
        return
    try:
        _activate(layers, name)
        yield
    finally:
        _activate(layers, before)


def _active(layers: Sequence[BaseTunerLayer]) -> str:
    """Return the policy that forwards use: `reference` without adapters."""
    if not layers or layers[0].disable_adapters:
        return REFERENCE
    name: str = layers[0].active_adapters[0]
    return name


def _activate(layers: Sequence[BaseTunerLayer], name: str) -> None:
    for layer in layers:
        if layer.disable_adapters != (name == REFERENCE):
            layer.enable_adapters(name != REFERENCE)
        if name != REFERENCE:
            layer.set_adapter(name, inference_mode=name != CURRENT)


def check_mergeable(module: nn.Module, *, advice: str) -> None:
    """UsageError with this advice for a quantised layer, to whose weights nothing can be added."""
    weight = getattr(module, "weight", None)
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise UsageError(
            f"adapters cannot be merged into {type(module).__name__}, whose weights are no floats: the model is "
            f"quantised. {advice}"
        )


@contextmanager
def merged(denoiser: nn.Module, name: str) -> Iterator[None]:
    """Use one policy inside, added into the base's weights, for inference.

    Forwards cost what the base's cost, and differ from those of `policy` by the rounding of the sums. Afterwards the
    base's own tensors are back. It takes memory for a second copy of the weights that carry an adapter. UsageError
    for a quantised base, to whose weights nothing can be added.
    """
    layers = _layers(denoiser)
    bases = [layer.get_base_layer() for layer in layers]
    for base in bases:
        check_mergeable(base, advice="Leave out rollout.merge_lora for a quantised base.")
    originals = [base.weight.data for base in bases]
    with policy(denoiser, REFERENCE):
        try:
            if name != REFERENCE:
                for layer, base, weight in zip(layers, bases, originals, strict=True):
                    delta = layer.get_delta_weight(name)
                    base.weight.data = (weight.float() + delta.float()).to(weight.dtype)
            yield
        finally:
            for base, weight in zip(bases, originals, strict=True):
                base.weight.data = weight


@torch.no_grad()
def folded(denoiser: ModelMixin, name: str) -> ModelMixin:
    """Return a model of the same class without adapters, with this one in its weights.

    The tensors that carry none are shared.
    """
    with torch.device("meta"):
        plain = type(denoiser).from_config(denoiser.config)
    with merged(denoiser, name):
        state = {
            key.replace(".base_layer", ""): tensor
            for key, tensor in [*denoiser.state_dict().items(), *denoiser.named_buffers()]
            if "lora_" not in key
        }
        names = {n for n, _ in [*plain.named_parameters(), *plain.named_buffers()]}
        for key in names:
            holder, _, leaf = key.rpartition(".")
            module = plain.get_submodule(holder)
            if leaf in module._buffers:
                module._buffers[leaf] = state[key]
            else:
                module._parameters[leaf] = nn.Parameter(state[key], requires_grad=False)
    return plain.eval()


def adapter_state(denoiser: nn.Module, name: str) -> dict[str, Tensor]:
    """Tensors of one adapter for a checkpoint."""
    return {
        key: value.detach().clone().contiguous()
        for key, value in get_peft_model_state_dict(denoiser, adapter_name=name).items()
    }


def load_adapter_state(denoiser: nn.Module, name: str, state: dict[str, Tensor]) -> None:
    """Set one adapter from what `adapter_state` returned.

    Raises:
        UsageError: the tensors do not fit the denoiser.
    """
    expected = get_peft_model_state_dict(denoiser, adapter_name=name)
    wrong = set(state) ^ set(expected) or {k for k in state if state[k].shape != expected[k].shape}
    if wrong:
        raise UsageError(
            f"model.name: the saved adapter {name!r} does not fit this model, for instance {sorted(wrong)[0]}. It was "
            "trained on another base model: put that one back, or choose another output_dir"
        )
    set_peft_model_state_dict(denoiser, state, adapter_name=name)


def _layers(denoiser: nn.Module) -> list[BaseTunerLayer]:
    return [m for m in denoiser.modules() if isinstance(m, BaseTunerLayer)]

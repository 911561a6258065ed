"""The papers' optimiser with all its oddities, the modern one, and the rate and decay of each parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from xclip_lab.config import OptimConfig

NamedParameters = Iterable[tuple[str, nn.Parameter]]
"""Pairs of a parameter's name in the official code and the parameter."""

Schedule = Callable[[float, float], float]
"""Progress (steps done / all steps) and warm-up share -> factor on the learning rate."""

MAX_LOGIT_SCALE = math.log(100)


def warmup_cosine(progress: float, warmup: float) -> float:
    """Official: linear from 0, then a cosine counted from step 0, not from the end of the warm-up. It jumps
    down where the warm-up ends and rises again past the last step.

    >>> [round(warmup_cosine(x, 0.1), 4) for x in (0, 0.05, 0.1, 0.5, 1, 1.5)]
    [0.0, 0.5, 0.9755, 0.5, 0.0, 0.5]
    """
    return progress / warmup if progress < warmup else 0.5 * (1 + math.cos(math.pi * progress))


def warmup_constant(progress: float, warmup: float) -> float:
    """Official: linear from 0 to 1, then 1."""
    return progress / warmup if progress < warmup else 1.0


def warmup_linear(progress: float, warmup: float) -> float:
    """Official: linear from 0 to 1, then linear to 0 at the last step."""
    return progress / warmup if progress < warmup else max((progress - 1) / (warmup - 1), 0.0)


# What the official optimiser offers. Recipes use the first; the other two serve a `BertAdam` of one's own.
SCHEDULES: dict[str, Schedule] = {
    "warmup_cosine": warmup_cosine,
    "warmup_constant": warmup_constant,
    "warmup_linear": warmup_linear,
}


def warmup_then_cosine(step: int, total_steps: int, warmup: float) -> float:
    """Modern: linear to 1 over `warmup * total_steps` steps, the first one above 0, then half a cosine to 0.

    >>> [round(warmup_then_cosine(step, 10, 0.2), 3) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.038]
    """
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


class BertAdam(Optimizer):
    """The papers' Adam: no bias correction, epsilon outside the root, weight decay added to the update before
    the rate multiplies it, each tensor's gradient clipped on its own, and a step count per tensor that skips
    steps without gradient. The rate of a step is taken from the count before it, so the first one is 0.

    Args:
        groups: as `parameter_groups` makes them, each with its `lr` and `weight_decay`.
        total_steps: where the schedule ends.
        warmup: its share of `total_steps`.
        max_grad_norm: per tensor; the global clip is the training loop's.
        schedule: a name in `SCHEDULES`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        total_steps: float,
        warmup: float,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        max_grad_norm: float = 1.0,
        schedule: str = "warmup_cosine",
    ) -> None:
        super().__init__(
            groups,
            {
                "total_steps": total_steps,
                "warmup": warmup,
                "betas": betas,
                "eps": eps,
                "max_grad_norm": max_grad_norm,
                "schedule": schedule,
            },
        )

    def _rate(self, group: dict[str, Any], parameter: Tensor) -> float:
        done = self.state[parameter].get("step", 0) / group["total_steps"]
        return group["lr"] * SCHEDULES[group["schedule"]](done, group["warmup"])

    def get_lr(self) -> list[float]:
        """The rate that the next step will use for each parameter that has a gradient."""
        return [
            self._rate(group, parameter)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update. Gradients are clipped in place, as the official optimiser leaves them."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(group, parameters)
        return loss

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        states = [self.state[p] for p in parameters]
        for state, parameter in zip(states, parameters, strict=True):
            if not state:
                zeros = torch.zeros_like(parameter)
                state.update(step=0, exp_avg=zeros, exp_avg_sq=zeros.clone())
        gradients = [p.grad for p in parameters if p.grad is not None]
        if group["max_grad_norm"] > 0:
            for gradient in gradients:
                norm = torch.linalg.vector_norm(gradient)
                gradient.mul_((group["max_grad_norm"] / (norm + 1e-6)).clamp(max=1.0))
        first = [state["exp_avg"] for state in states]
        second = [state["exp_avg_sq"] for state in states]
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, gradients, alpha=1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(first, denominators)
        if group["weight_decay"] > 0:
            torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
        torch._foreach_mul_(updates, [-self._rate(group, p) for p in parameters])
        torch._foreach_add_(parameters, updates)
        for state in states:
            state["step"] += 1


class CosineAdamW(AdamW):
    """torch's AdamW (bias correction, decoupled decay) with `warmup_then_cosine` inside: its state dict holds
    all that a resumed run needs."""

    def __init__(
        self, groups: list[dict[str, Any]], total_steps: int, warmup: float, **settings: Any
    ) -> None:
        super().__init__(groups, **settings)
        for group in self.param_groups:
            group.update(base_lr=group["lr"], total_steps=total_steps, warmup=warmup, steps_done=0)

    def get_lr(self) -> list[float]:
        """The rate that the next step will use, one a group."""
        return [
            group["base_lr"] * warmup_then_cosine(group["steps_done"], group["total_steps"], group["warmup"])
            for group in self.param_groups
        ]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update at the scheduled rates."""
        for group, lr in zip(self.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr
            group["steps_done"] += 1
        return super().step(closure)


def in_towers(name: str) -> bool:
    """Whether an official parameter name lies in CLIP (logit_scale does, `transformerClip.` does not)."""
    return "clip." in name


def official_decays(name: str) -> bool:
    """Official: only these names are free of decay, so the towers' `ln_*.weight` and logit_scale decay."""
    return not any(part in name for part in ("bias", "LayerNorm.bias", "LayerNorm.weight"))


def decays(name: str, parameter: Tensor, undecayed: Collection[str] = ()) -> bool:
    """Modern: matrices decay. Biases, norms and logit_scale (one axis or none), embeddings, and what the
    model's parts name themselves (`undecayed_parameters`) do not."""
    return parameter.ndim > 1 and "embedding" not in name and name not in undecayed


def undecayed_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that `model` or a module in it exempts from decay.

    A module does so by a method `no_weight_decay()` that returns names of its own parameters, as in timm and
    open_clip: positions, class tokens, matrices that start as identity.
    """
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }


def parameter_groups(
    named: NamedParameters, config: OptimConfig, undecayed: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Four groups: decayed towers, decayed new modules, undecayed towers, undecayed new modules.

    Args:
        named: pairs of official name and parameter.
        config: `lr` for new modules, `lr * coef_lr` for the towers; `recipe` chooses the rule of decay.
        undecayed: official names that the modern rule leaves free of decay; the official rule has no such.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": float(lr), "weight_decay": float(decay)}  # plain, for a weights-only load
        for decay in (config.weight_decay, 0.0)
        for lr in (config.lr * config.coef_lr, config.lr)
    ]
    for name, parameter in named:
        official = config.recipe == "official"
        decayed = official_decays(name) if official else decays(name, parameter, undecayed)
        groups[2 * (not decayed) + (not in_towers(name))]["params"].append(parameter)
    return groups


def create_optimizer(
    named: NamedParameters, config: OptimConfig, total_steps: int, undecayed: Collection[str] = ()
) -> BertAdam | CosineAdamW:
    """The optimiser of a recipe over `parameter_groups`; both carry their schedule and have `get_lr()`."""
    groups = [group for group in parameter_groups(named, config, undecayed) if group["params"]]
    betas = (float(config.beta1), float(config.beta2))
    eps, warmup = float(config.eps), float(config.warmup_proportion)
    if config.recipe == "official":
        clip = float(config.max_grad_norm)
        return BertAdam(groups, total_steps, warmup, betas=betas, eps=eps, max_grad_norm=clip)
    return CosineAdamW(groups, total_steps, warmup, betas=betas, eps=eps, fused=True)


def freeze_parameters(
    named: NamedParameters, freeze_layer_num: int, freeze_with_3d_patch: bool = False
) -> None:
    """Official freezing: -1 trains everything; 0 freezes the towers' embeddings and stems (token, positional
    and class embeddings, conv1, ln_pre); n also the first n blocks of both towers.

    Args:
        named: pairs of official name and parameter.
        freeze_with_3d_patch: officially a 3D patch embedding (`clip.visual.conv2`) switches all of this off;
            True freezes the rest as without it and trains the new embedding itself (ledger 11).
    """
    parameters = dict(named)
    if f"clip.{_PATCH_3D}weight" in parameters and not freeze_with_3d_patch:
        return
    for name, parameter in parameters.items():
        if name.startswith("clip.") and _is_frozen(name.removeprefix("clip."), freeze_layer_num):
            parameter.requires_grad_(False)


_PATCH_3D = "visual.conv2."
_TRAINED = ("ln_final.", "text_projection", "logit_scale", "visual.ln_post.", "visual.proj", _PATCH_3D)
"""What no number of frozen layers reaches."""


def freeze_towers(named_parameters: NamedParameters) -> None:
    """Stop the training of both towers, whose outputs are stored; the learnt scale goes on."""
    for name, parameter in named_parameters:
        if in_towers(name) and name != "clip.logit_scale":
            parameter.requires_grad_(False)


def _is_frozen(name: str, freeze_layer_num: int) -> bool:
    if freeze_layer_num < 0 or name.startswith(_TRAINED):
        return False
    if name.startswith(("transformer.resblocks.", "visual.transformer.resblocks.")):
        block = int(name.split(".resblocks.")[1].split(".")[0])
        return block < freeze_layer_num
    return True


@torch.no_grad()
def clamp_logit_scale(logit_scale: Tensor) -> None:
    """Keep CLIP's scale at 100 or less, in place; after every optimiser step."""
    logit_scale.clamp_(max=MAX_LOGIT_SCALE)

"""SGD and schedule-free SGD: P is 1."""

from __future__ import annotations

from .rule import Group, Rule, learning_rate


def kappa(group: Group, first_step: bool) -> float:
    """SGD's threshold: heavy ball, dampened, or Nesterov."""
    b, dampening = float(group["momentum"]), float(group["dampening"])
    if b == 0:
        result = 2.0
    elif first_step:  # the first buffer is the gradient itself, not dampened
        result = 2 / (1 + b) if group["nesterov"] else 2.0
    elif group["nesterov"]:
        result = 2 * (1 + b) / (1 + 2 * b)
    else:
        result = 2 * (1 + b) / (1 - dampening)
    # Coupled decay adds w to every curvature; P is 1, so kappa can take it off again.
    return result - learning_rate(group) * float(group["weight_decay"])


def schedule_free_kappa(interpolation: float, group: Group, first_step: bool) -> float:
    """Return the threshold of a schedule-free optimizer at its coming step, for the parameters as they are in training.

    They hold ``y = (1 - b) z + b x``, where x averages the z with weight c for the newest. With ``a = lr h / P``:

        y' = (1 - c - a (1 - b (1 - c))) y + c z        z' = z - a y

    This map has the eigenvalue -1 at ``a = 2 (2 - c) / (2 - 2b + c (2b - 1))``: 2 at the first step (c = 1), and
    ``2 / (1 - b)`` late in training (c -> 0).

    Args:
        interpolation: b.
        group: as ``schedulefree`` keeps it.
        first_step: for c = 1.

    Source: Defazio et al., The road less scheduled (2024), equations 3 to 5, for the update.
    """
    k, warmup, lr = int(group["k"]), int(group["warmup_steps"]), learning_rate(group)
    share = (k + 1) / warmup if k < warmup else 1.0  # of lr, by the optimizer's own warmup
    largest = max(lr * share, float(group["lr_max"]))
    weight = (k + 1) ** float(group["r"]) * largest ** float(group["weight_lr_power"])
    total = float(group["weight_sum"]) + weight
    c = 1.0 if first_step else weight / total if total > 0 else 0.0
    b = interpolation
    result = 2 * (2 - c) / (2 - 2 * b + c * (2 * b - 1))
    # The decay is part of the step and is not divided by P: like coupled decay of SGD, it adds lr w to lr h / P.
    return result / share - lr * float(group["weight_decay"])


def _schedule_free(group: Group, first_step: bool) -> float:
    return schedule_free_kappa(float(group["momentum"]), group, first_step)


SGD = Rule(kappa, moments=("momentum_buffer", ""), rise=0.1)
SCHEDULE_FREE_SGD = Rule(
    _schedule_free,
    moments=("", ""),
    rise=0.1,
    # The average's weights contain lr, and the step goes towards z whatever lr is.
    scales_with_lr=False,
    options="lr momentum r k warmup_steps train_mode weight_sum lr_max scheduled_lr weight_lr_power weight_decay "
    "foreach",
)

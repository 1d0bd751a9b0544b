"""A run in words."""

from __future__ import annotations

from typing import Any

from ..dynamics import TRENDS, Catapult, classify_regime, detect_catapults, first_crossing
from .metrics import Row


def catapults_of(rows: list[Row]) -> list[Catapult]:
    """Find the catapults of a run; indices into its rows, all of which have a finite loss."""
    kappa = _kappa(rows)
    if kappa is None or not rows:
        return []
    return detect_catapults(_column(rows, "loss"), _curvature(rows), _column(rows, "lr"), kappa)


def summary_lines(rows: list[Row]) -> list[str]:
    """Return the run in sentences: initial sharpness, first crossing, catapults, regime, final accuracy, cost.

    Args:
        rows: of metrics.jsonl, at least one.

    Raises:
        ValueError: no row.
    """
    if not rows:
        raise ValueError("the run has no rows yet.")
    # A divergence and an untracked step have no sharpness; steps between two solves carry the last value.
    measured = [row for row in rows if row.get("sharpness") is not None]
    adaptive = any(row.get("preconditioned_sharpness") is not None for row in rows)
    what = "Preconditioned sharpness" if adaptive else "Sharpness"
    curvature = _curvature(measured)
    lines: list[str] = []
    if measured:
        lines.append(
            f"{what} at initialisation: {curvature[0]:.4g}; after {rows[-1]['step']} steps: {curvature[-1]:.4g}."
        )
        if (adam := measured[0].get("initial_adam")) and (gi_adam := measured[0].get("initial_gi_adam")):
            lines.append(
                f"Before the first step the preconditioned sharpness is {adam:.4g} for Adam and {gi_adam:.4g} for "
                f"GI-Adam, {adam / gi_adam:.3g} times less."
            )
        ratio = _column(measured, "ratio")
        crossing = first_crossing(ratio)
        if crossing is None:
            largest = max((r for r in ratio if r is not None), default=0.0)
            lines.append(f"The stability threshold was never crossed: lr x curvature reached {largest:.0%} of it.")
        else:
            row = measured[crossing]
            lines.append(
                f"First crossing of the stability threshold: step {row['step']}, learning rate {row['lr']:.4g}, "
                f"sharpness {curvature[crossing]:.4g}."
            )
        catapults = catapults_of(measured)
        lines.append(_catapults(catapults, measured))
        kappa = _kappa(measured)
        # A regime is told by ratios to the first value, which have no meaning at a saddle without positive curvature.
        if kappa is not None and curvature[0] > 0:
            regime = classify_regime(curvature, _column(measured, "lr"), kappa)
            when = "at the end" if crossing is None else "at the first crossing"
            caution = "" if regime.confident else ", too early to be sure: a slower warmup would tell"
            lines.append(
                f"Natural trend: {TRENDS[regime.name]} ({regime.name}), {regime.trend:.2f} of the initial value "
                f"{when}{caution}."
            )
    lines += _along(rows)
    if rows[-1].get("diverged"):
        lines.append(f"The run diverged: the loss was not finite at step {rows[-1]['step']}.")
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    if losses:
        lines.append(f"Training loss: {losses[0]:.4g} to {losses[-1]:.4g}.")
    lines += _failing(rows)
    evaluated = [row for row in rows if row.get("test_accuracy") is not None]
    if evaluated:
        last = evaluated[-1]
        lines.append(f"Accuracy: {last['train_accuracy']:.1%} on training, {last['test_accuracy']:.1%} on test data.")
    if measured:
        matvecs, seconds = sum(r["matvecs"] for r in measured), sum(r["seconds"] for r in measured)
        lines.append(
            f"Cost: {matvecs / len(measured):.1f} Hessian-vector products and {seconds / len(measured):.2f} s a step."
        )
    return lines


def _along(rows: list[Row]) -> list[str]:
    """Say how the batch sharpness went, in units of 1 / lr."""
    products = [row["batch_sharpness"] * row["lr"] for row in rows if row.get("batch_sharpness") is not None]
    if not products:
        return []
    late = products[len(products) // 2 :]
    mean = sum(late) / len(late)
    return [f"Batch sharpness x lr: {products[0]:.3g} at first, {mean:.3g} on average over the second half."]


def _failing(rows: list[Row]) -> list[str]:
    """Say what shows that Adam is failing: a second moment inflated by a spike, and units without a gradient."""
    found = [row for row in rows if row.get("v_norm")]
    if not found:
        return []
    # A spike of the gradient inflates v for 1 / (1 - b2) steps: the largest value shows it, the last one may not.
    highest = max(found, key=lambda row: row["v_norm"])
    return [
        f"Norm of the second moment: {found[0]['v_norm']:.3g} at first, at most {highest['v_norm']:.3g}, at step "
        f"{highest['step']}; of the units, {found[-1]['dead_units']:.1%} had no gradient at the end, "
        f"{found[0]['dead_units']:.1%} at first."
    ]


def _catapults(catapults: list[Catapult], rows: list[Row]) -> str:
    if not catapults:
        return "No catapult."
    highest = max(catapults, key=lambda c: c.loss_ratio)
    where = ", ".join(str(rows[c.start]["step"]) for c in catapults[:8]) + (", ..." if len(catapults) > 8 else "")
    return (
        f"{len(catapults)} catapult(s), starting at step(s) {where}; the largest raised the loss "
        f"{highest.loss_ratio:.2f} times and lowered the sharpness by {highest.sharpness_drop:.0%}."
    )


def _curvature(rows: list[Row]) -> list[Any]:
    adaptive = any(row.get("preconditioned_sharpness") is not None for row in rows)
    return _column(rows, "preconditioned_sharpness" if adaptive else "sharpness")


def _kappa(rows: list[Row]) -> float | None:
    """Return threshold x lr, which is the same at every step; None if no row has a threshold."""
    # At a rate of 0 the threshold is infinite, and their product NaN.
    return next((row["threshold"] * row["lr"] for row in rows if row.get("threshold") is not None and row["lr"]), None)


def _column(rows: list[Row], key: str) -> list[Any]:
    return [row.get(key) for row in rows]

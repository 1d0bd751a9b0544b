"""What ``scripts/models.py`` found for a model, and the page and lines that it writes of that."""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass

import torch

COMMAND = "make models"
GRADIENT = 1e-6  # relative, float32
PRODUCT = 1e-9  # relative, float64
CASTS = 64  # units of the coarsest rounding, for a model that casts to a narrower dtype inside
_HEAD = """# Models

Does sharpkern give the right gradient and the right Hessian-vector product for a model that its authors did not write?
{models} models were tried, each in the modes that it runs in: {hugging} tiny Hugging Face configurations, and
constructs of plain torch.

{summary}

What the columns say:

- *engine*: `program`, the exported list of ops, or `double backward`, torch's autograd after a warning
  ([correctness.md](../explain/correctness.md) says when).
- *p.grad*: relative error, against eager torch, of the gradient that `SharpnessTracker.step` leaves, in float32.
- *product*: relative error of a Hessian-vector product against double backward, in float64; against central
  differences where torch has no second derivative.
- *inside*: the narrowest dtype that the float64 model computes in. A cast to float32 limits the product to about 1e-7.
- *audit*: the verdict of `sharpkern.audit` on the float32 model, and the largest error that it found.

"No scalar" marks models whose backward is not their forward's derivative. Their product agrees with torch's own second
pass, but there is no Hessian, and the audit must say "wrong". Every other model must be called "trustworthy".
"""
_FOOT = """
torch {torch}, transformers {transformers}, on a CPU. The table is made by `{command}`, which compares everything again
and returns 1 if a number or a verdict is wrong.
"""


@dataclass
class Row:
    """What was found for one model in one mode.

    Attributes:
        loss: relative error in float64.
        gradient: relative error of ``p.grad`` in float32 against eager torch.
        rounding: the same of eager torch itself, against its float64 gradient.
        product: relative error in float64.
        coarsest: unit of rounding of the narrowest dtype inside the float64 model.
        truth: what the product was compared with.
        verdict: the audit's first words.
        claimed: the largest error that the audit has found.
        parameters: how many numbers are trained.
    """

    name: str
    group: str
    mode: str
    engine: str = ""
    loss: float = float("nan")
    gradient: float = float("nan")
    rounding: float = float("nan")
    product: float = float("nan")
    coarsest: float = float("nan")
    truth: str = ""
    status: str = ""
    verdict: str = ""
    claimed: float = float("nan")
    symmetric: bool = True
    error: str = ""
    parameters: int = 0

    @property
    def right(self) -> bool:
        """Whether loss, gradient and product are within the tolerances."""
        # Where eager torch itself is further from the truth, its rounding is what two right gradients differ by.
        allowed = GRADIENT if math.isnan(self.rounding) else max(GRADIENT, 4 * self.rounding)
        wide = max(PRODUCT, CASTS * self.coarsest)
        return not self.error and self.gradient <= allowed and max(self.loss, self.product) <= wide

    @property
    def end(self) -> str:
        """How it ended, in a word or two."""
        if self.error:
            return "refused" if self.engine == "refused" else "FAILED"
        if not self.right:
            return "WRONG" if self.status != "trustworthy" else "WRONG, false pass"
        expected = "trustworthy" if self.symmetric else "wrong"
        if self.status != expected:
            return "false alarm" if self.status == "wrong" else "false pass" if self.symmetric is False else "unchecked"
        return "right"


def line(row: Row) -> str:
    """Return a row of the table."""
    numbers = [f"{x:.0e}" if x == x else "" for x in (row.loss, row.product, row.gradient, row.rounding)]
    casts = "float32 inside" if row.coarsest > 1e-8 and row.truth == "double backward" else row.truth
    audit = f"{row.status}, {row.claimed:.0e}" if row.status else ""
    cells = (row.name, row.mode, row.engine, *numbers, casts, audit, row.end + (f": {row.error}" * bool(row.error)))
    return "| " + " | ".join(cell.replace("|", "/")[:160] for cell in cells) + " |"


def page(rows: list[Row]) -> str:
    """Return docs/lab/models.md."""
    import transformers

    names = {row.name: row.group for row in rows}
    hugging = sum(group == "Hugging Face" for group in names.values())
    table = ["| model | mode | parameters | engine | p.grad | product | inside | audit | outcome |", "|---" * 9 + "|"]
    head = _HEAD.format(models=len(names), hugging=hugging, summary=summary(rows))
    foot = _FOOT.format(torch=torch.__version__, transformers=transformers.__version__, command=COMMAND)
    return "\n".join([head, *table, *map(page_line, rows)]) + "\n" + foot


def summary(rows: list[Row]) -> str:
    """Say in words how the comparisons ended."""
    ends = collections.Counter(row.end for row in rows)
    programs = sum(row.engine.startswith("program") for row in rows)
    judged = [row for row in rows if row.right]
    worst = max((row.gradient for row in judged), default=float("nan"))
    exact = max((row.product for row in judged if row.coarsest < 1e-8), default=float("nan"))
    listed = ", ".join(f"{n} {end}" for end, n in ends.most_common() if end != "right")
    return (
        f"Of {len(rows)} rows, {ends['right']} are right and judged rightly by the audit; others: {listed or 'none'}. "
        f"{programs} rows become a program. The largest error of a gradient is {worst:.0e} in float32, of a product "
        f"{exact:.0e} where the model computes in float64 throughout."
    )


def page_line(row: Row) -> str:
    """Return a row of the page's table."""
    gradient, product = (f"{x:.0e}" if x == x else "" for x in (row.gradient, row.product))
    inside = {torch.finfo(d).eps: str(d).removeprefix("torch.") for d in (torch.float64, torch.float32, torch.bfloat16)}
    truth = "differences" if row.truth == "differences" else inside.get(row.coarsest, "")
    audit = f"{row.status}, {row.claimed:.0e}" if row.status else ""
    name = row.name + ("" if row.symmetric else " (no scalar)")
    end = row.end + (f": {row.error}" * bool(row.error))
    cells = (name, row.mode, f"{row.parameters:,}", row.engine, gradient, product, truth, audit, end)
    return "| " + " | ".join(cell.replace("|", "/")[:160] for cell in cells) + " |"

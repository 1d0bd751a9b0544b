"""Steps that cannot be measured though their loss is finite: recorded, so that training goes on."""

from __future__ import annotations

import warnings

from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..curvature.losses import NonFiniteLossError
from ..curvature.repeatable import ChangedLossError
from ..curvature.wrappers import Kind
from ..eigen.common import NonFiniteProductError
from ..optimizers.preconditioner import NonFinitePreconditionerError

# The loss is that of a probe or of a loader: a step's own is raised before anything is measured.
FAILURES = (NonFiniteProductError, NonFinitePreconditionerError, NonFiniteLossError, ChangedLossError, LinAlgError)


class Failures:
    """Warns of the first step that could not be measured."""

    def __init__(self) -> None:
        self.warned = False

    def note(self, error: Exception, step: int, kind: Kind) -> None:
        """Take note of a step's error, one of ``FAILURES``.

        Args:
            error: what was raised.
            step: 1 for the first.
            kind: what the model is wrapped in.

        Raises:
            Exception: the error itself, where only one of several processes may have met it.
        """
        # A product's check sees the same bits on every process. Of the others, one might go on while the rest wait.
        if kind != "plain" and not isinstance(error, NonFiniteProductError):
            raise error
        if not self.warned:
            warnings.warn(
                f"step {step} could not be measured: {error} Its record has status='failed', and training goes on; "
                "later steps that fail have it too, without a warning.",
                stacklevel=4,
            )
        self.warned = True

"""Memory that nobody has written holds NaN: a kernel or a replay that reads it, or leaves it unwritten, shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sharpkern.rop.recording.pool import Pool
from sharpkern.rop.recording.replayed import ReplayedProgram
from sharpkern.rop.recording.tape import Tape


def poison(pool: Pool, start: int, size: int) -> None:
    base = pool._base(start)
    pool._slabs[base][start - base : start - base + size] = 0xFF  # NaN in every floating dtype


def poison_free(pool: Pool) -> None:
    while pool._returned:
        pool._give(pool._returned.pop())
    for span in pool._free:
        poison(pool, span.start, span.size)


@contextmanager
def nan_memory() -> Iterator[None]:
    """Within the block these are NaN: torch's new tensors (``empty``, ``empty_like`` and the like, what its ops ask for
    by these); a pool's new slabs, and its blocks that are free again; before a replay the recording's own results, and,
    but for backward and gradient, all that is free of its pool.
    """
    give, run = Pool._give, ReplayedProgram._run

    def given(pool: Pool, start: int) -> None:
        poison(pool, start, pool._taken[start])
        give(pool, start)

    def replayed(program: ReplayedProgram, key: Any, *arguments: Any, **keywords: Any) -> None:
        recording = program._recordings.get(key)
        if isinstance(recording, Tape):
            for t in recording._results:  # its own, from which a replay copies
                t.fill_(torch.nan)
            # Not between the primal sweeps: what forward leaves for backward may be free once both are recorded.
            if key not in ("backward", "gradient"):
                poison_free(program._memory)
        run(program, key, *arguments, **keywords)

    # Torch fills what is not initialised in this mode alone. Ops without a deterministic version warn, and go on.
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pool, "_give", given)
        patch.setattr(ReplayedProgram, "_run", replayed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled

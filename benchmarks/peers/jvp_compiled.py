"""``jvp(jacrev(loss))`` under ``torch.compile``, as curvlinops' unreleased version does. Compiles on first use."""

from __future__ import annotations

import torch

from . import jvp_jacrev
from .common import Workload

torch.compiler.config.force_disable_caches = True  # compile times are not to depend on what ran here before


class PEER(jvp_jacrev.PEER):
    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        self.one = torch.compile(self.one, fullgraph=True, dynamic=False)
        self.many = torch.compile(self.many, fullgraph=True, dynamic=False)

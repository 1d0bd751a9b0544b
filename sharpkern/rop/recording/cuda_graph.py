"""A sweep on a GPU as a CUDA graph: one launch instead of one per kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .common import NotReplayableError, copy_all


class CUDAGraph:
    """A captured stream of kernels: one launch from the host, between copies of inputs and results."""

    def __init__(self, computation: Callable[..., None], inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        # A graph reads and writes fixed addresses: the caller's tensors are copied in and out.
        self._inputs, self._results = [t.clone() for t in inputs], [t.clone() for t in results]
        # A stream of its own, as torch asks for in front of a capture.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():  # libraries allocate their workspaces outside of the capture
            computation(*self._inputs, *self._results)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.no_grad(), torch.cuda.graph(self._graph):
                computation(*self._inputs, *self._results)
        except RuntimeError as error:
            raise NotReplayableError(f"CUDA cannot capture it: {error}") from error
        # A capture only notes the kernels down; the first result comes from a replay.
        self.replay(inputs, results)

    def replay(self, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Copy the inputs in, launch the graph, copy the results out."""
        copy_all(inputs, self._inputs)
        self._graph.replay()
        copy_all(self._results, results)

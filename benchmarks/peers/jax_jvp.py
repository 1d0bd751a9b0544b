"""JAX, ``jit(jvp(grad))``, in a process of its own with the same weights, batch and number of threads."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .common import Peer, Workload

if find_spec("jax") is None:
    raise ImportError("No module named 'jax'")


class PEER(Peer):
    """``multiply`` returns the seconds measured there; ``flat`` gives the product, ``bytes`` its memory."""

    method = "jvp"

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        self.names = [key for key, _ in work.model.named_parameters()]
        np.savez(self.folder / "weights.npz", **{key: p.detach().numpy() for key, p in work.model.named_parameters()})
        np.savez(self.folder / "batch.npz", *(t.numpy() for t in work.batch))
        script = Path(__file__).with_name("jax_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(self.folder), _name_of(work), str(torch.get_num_threads())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._read()
        self.compile_seconds: float = 0.0
        self.bytes: int | None = None

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the JAX process ended")
        return json.loads(line)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        time.sleep(0.01)  # let this process's threads go to sleep
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        reply = self._read()
        self.compile_seconds = max(self.compile_seconds, reply["compile_seconds"])
        self.bytes = reply["bytes"]
        return reply

    def gradient(self) -> float:
        """Seconds of one gradient."""
        return self.ask(method="gradient")["seconds"]

    def native(self, V: Tensor) -> str:
        path = self.folder / f"vectors_{V.shape[1]}.npz"
        blocks = [torch.stack(parts).numpy() for parts in zip(*(self.cut(v.contiguous()) for v in V.t()), strict=True)]
        np.savez(path, **dict(zip(self.names, blocks, strict=True)))
        return str(path)

    def multiply(self, vectors: str) -> float:
        self.last = vectors
        return self.ask(method=self.method, vectors=vectors)["seconds"]

    def flat(self, products: float) -> Tensor:  # noqa: ARG002
        path = self.folder / "product.npz"
        self.ask(method=self.method, vectors=self.last, result=str(path))
        product = np.load(path)
        return torch.cat([torch.from_numpy(product[key]).flatten(1) for key in self.names], 1).t()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self._folder.cleanup()


def _name_of(work: Workload) -> str:
    """Which model of jax_models.py this is."""
    kinds = {"GPT": "gpt", "WideResNet": "wrn", "Conv2d": "cnn", "GELU": "overhead"}
    found = {type(m).__name__ for m in work.model.modules()}
    return next((name for kind, name in kinds.items() if kind in found), "mlp")

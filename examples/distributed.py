"""Track the sharpness of the global batch while several processes train one model, under DDP or fully_shard (FSDP2).

    torchrun --nproc_per_node=2 examples/distributed.py            # DistributedDataParallel
    torchrun --nproc_per_node=2 examples/distributed.py --shard    # fully_shard

Runs on CPUs (gloo). On GPUs initialise "nccl", set the device of each process, and move model and batches there.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sharpkern as sk


def wrapped(shard: bool) -> nn.Module:
    """Return the model, the same on every process, wrapped for DDP or FSDP2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    if not shard:
        return nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main() -> None:
    """Train 20 steps, each process on its own data; the first one prints."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = wrapped("--shard" in sys.argv)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tracker = sk.SharpnessTracker(model, nn.functional.cross_entropy, optimizer)
    data = torch.Generator().manual_seed(rank)
    patterns = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    for step in range(20):
        y = torch.randint(0, 4, (32,), generator=data)
        batch = patterns[y] + torch.randn(32, 8, generator=data), y
        if step < 10:
            record = tracker.step(batch)  # in the place of forward and backward: averaged gradients in p.grad
        else:  # beside a loop of one's own
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
            record = tracker.observe(batch)
        optimizer.step()
        if rank == 0:
            print(f"step {record.step}: loss {record.loss:.3f}, sharpness {record.sharpness:.3f}")
    # Every process makes the same calls; the value is that of all processes' last batches.
    last = sk.sharpness(model, nn.functional.cross_entropy, batch, tol=1e-4)
    if rank == 0:
        print(f"at the end: {last.value:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

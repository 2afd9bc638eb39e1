"""FSDP2 (``fully_shard``), optionally hybrid: shards within a group, replicas between groups.

torchrun --nproc-per-node 2 examples/fsdp2.py
torchrun --nproc-per-node 4 examples/fsdp2.py --replicas 2      # HSDP: 2 replicas of 2 shards
"""

from __future__ import annotations

import on_ranks
import torch.distributed as dist
import toy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def main() -> None:
    """Train; a later start may have another number of ranks."""
    parser = toy.arguments(__doc__)
    parser.add_argument("--replicas", type=int, default=1)
    args = parser.parse_args()

    def wrap(model: nn.Sequential) -> nn.Module:
        shards = dist.get_world_size() // args.replicas
        if args.replicas > 1:
            mesh = init_device_mesh("cpu", (args.replicas, shards), mesh_dim_names=("replica", "shard"))
        else:
            mesh = init_device_mesh("cpu", (shards,))
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    on_ranks.train(args, wrap)


if __name__ == "__main__":
    main()

"""FSDP1 (``FullyShardedDataParallel``), optionally hybrid. New code is better off with ``fsdp2.py``.

torchrun --nproc-per-node 2 examples/fsdp1.py
torchrun --nproc-per-node 4 examples/fsdp1.py --replicas 2      # HSDP: 2 replicas of 2 shards
"""

from __future__ import annotations

import on_ranks
import torch
import torch.distributed as dist
import toy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy


def main() -> None:
    """Train; a later start may have another number of ranks."""
    parser = toy.arguments(__doc__)
    parser.add_argument("--replicas", type=int, default=1)
    args = parser.parse_args()

    def wrap(model: nn.Sequential) -> nn.Module:
        if args.replicas == 1:
            mesh, strategy = None, ShardingStrategy.FULL_SHARD
        else:
            shape = (args.replicas, dist.get_world_size() // args.replicas)
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard"))
            strategy = ShardingStrategy.HYBRID_SHARD
        return FullyShardedDataParallel(
            model,
            device_mesh=mesh,
            sharding_strategy=strategy,
            auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )

    on_ranks.train(args, wrap)


if __name__ == "__main__":
    main()

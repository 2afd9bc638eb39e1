"""DistributedDataParallel: the same three lines, on every rank.

torchrun --nproc-per-node 2 examples/ddp.py
"""

from __future__ import annotations

import on_ranks
import toy
from torch.nn.parallel import DistributedDataParallel

if __name__ == "__main__":
    on_ranks.train(toy.arguments(__doc__).parse_args(), DistributedDataParallel)

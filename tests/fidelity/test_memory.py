"""No second copy of the state in a trainer's own memory, neither at a save nor at a load, of 256 MiB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CODE = """
import json, sys, threading, time
import torch
from ckptstore import CheckpointStore, StoreConfig

MIB = 1 << 20

def own():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

class Peak:
    def __enter__(self):
        self.base, self.most, self.done = own(), 0, False
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done:
            self.most = max(self.most, own())
            time.sleep(0.001)

    def __exit__(self, *_):
        self.done = True
        self.thread.join()
        self.mib = (max(self.most, own()) - self.base) / MIB

folder = sys.argv[1]
config = StoreConfig(agent_idle_exit_seconds=2)
state = {"model": {str(i): torch.randn(4 * MIB) for i in range(16)}, "epoch": 3}
found = {}
with CheckpointStore(f"{folder}/store", remote=f"file://{folder}/bucket", config=config) as store:
    store.save({"small": torch.ones(3)}, 0, wait="local")
    with Peak() as peak:
        store.save(state, 1, wait="remote")
    found["save"] = peak.mib
    with Peak() as peak:
        store.load(state, 1)
    found["load"] = peak.mib
with CheckpointStore(None, remote=f"file://{folder}/bucket") as store, Peak() as peak:
    store.load(state, 1)
found["remote"] = peak.mib
print(json.dumps(found))
"""


def test_a_save_and_a_load_take_no_second_copy_of_the_state(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)],
        capture_output=True, text=True, timeout=170, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["save"] < 24, "the copy is in the agent's memory"
    assert found["load"] < 64
    assert found["remote"] < 128, "compressed bytes of a few requests, and what they are decoded to"

"""The manager's small parts."""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ckptstore.config import StoreConfig
from ckptstore.errors import ConfigError
from ckptstore.manager import compare, health, rng
from ckptstore.manager.children import ChildWatch
from ckptstore.manager.emergency import OptimizerGuard
from ckptstore.manager.grace import end_of_allocation, grace_of
from ckptstore.manager.options import check_signals, open_store, run_name
from ckptstore.manager.safety import command
from ckptstore.ops.settings import Settings
from ckptstore.store import CheckpointStore


def test_random_state_comes_back_everywhere() -> None:
    random.gauss(0, 1)
    np.random.randn()
    state = rng.capture()
    drawn = (random.random(), random.gauss(0, 1), np.random.randn(3).tolist(), torch.rand(3).tolist())
    assert rng.restore(state) == []
    assert (random.random(), random.gauss(0, 1), np.random.randn(3).tolist(), torch.rand(3).tolist()) == drawn


def test_capturing_random_state_draws_nothing() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    rng.capture()
    assert torch.equal(torch.rand(1), expected)


def test_differences_name_the_setting() -> None:
    stored = {"lr": 0.1, "model": {"depth": 2, "old": 1}, "nan": math.nan}
    current = {"lr": 0.2, "model": {"depth": 2, "new": 3}, "nan": math.nan}
    assert compare.differences(stored, current) == [
        "lr: 0.1 -> 0.2",
        "model.old: 1 -> absent",
        "model.new: absent -> 3",
    ]
    assert compare.differences(stored, stored) == []
    assert compare.differences(dict.fromkeys(range(20), 0), dict.fromkeys(range(20), 1))[-1] == "and 12 more"


def test_settings_of_every_kind_are_plain_values() -> None:
    @dataclass(frozen=True)
    class Config:
        lr: float
        names: tuple[str, ...]

    assert compare.plain(Config(0.1, ("a",))) == {"lr": 0.1, "names": ["a"]}
    assert compare.plain(argparse.Namespace(x=torch.float32)) == {"x": "torch.float32"}
    assert compare.is_config(Config(0.1, ()))
    assert not compare.is_config({"lr": 1})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_values_are_found_wherever_they_are_when_the_look_is_thorough(bad: float) -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(300, 300)])
    assert not health.has_bad_values([model], turn=0, is_thorough=True)
    with torch.no_grad():
        model[1].weight[7, 9] = bad
    assert health.has_bad_values([model], turn=0, is_thorough=True)
    found = [health.has_bad_values([model], turn=turn, is_thorough=False) for turn in range(health.TURNS)]
    assert sum(found) == 1, "large tensors take turns"


def test_large_finite_values_are_not_bad() -> None:
    model = nn.Linear(64, 64)
    nn.init.constant_(model.weight, torch.finfo(torch.float32).max)
    assert not health.has_bad_values([model], turn=0, is_thorough=True)


def test_the_guard_tells_whole_steps_from_torn_ones() -> None:
    class Breaking(torch.optim.SGD):
        breaks = False

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            if self.breaks:
                raise RuntimeError
            super().step(closure)

    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    one, two = Breaking(models[0].parameters(), lr=0.1), torch.optim.SGD(models[1].parameters(), lr=0.1)
    guard = OptimizerGuard(ChildWatch())
    guard.watch([one, two])
    assert guard.completed() == 0
    one.step()
    assert guard.completed() is None, "one of two has stepped"
    two.step()
    assert guard.completed() == 1
    guard.mark()
    assert guard.completed() == 0
    one.breaks = True
    with pytest.raises(RuntimeError):
        one.step()
    assert guard.completed() is None
    guard.release()
    assert not one._optimizer_step_pre_hooks
    assert not one._optimizer_step_post_hooks


def test_the_grace_is_what_was_said_or_what_is_usual() -> None:
    assert grace_of(None, {}) == 25
    assert grace_of(None, {"CKPTSTORE_GRACE_SECONDS": "100"}) == 100
    assert grace_of(7, {"CKPTSTORE_GRACE_SECONDS": "100"}) == 7
    with pytest.raises(ConfigError):
        grace_of(0, {})
    assert end_of_allocation({"SLURM_JOB_END_TIME": "1790000000"}) == 1790000000
    assert end_of_allocation({}) is None


def test_the_run_is_named_after_the_model_when_nothing_else_is_said(tmp_path: Path) -> None:
    nothing = Settings.read({}, tmp_path)
    assert run_name(None, "meta-llama/Llama 3", nothing) == "meta-llama-Llama-3"
    assert run_name("r", "m", nothing) == "r"
    assert run_name(None, None, nothing) is None
    said = Settings.read({"CKPTSTORE_RUN": "from-env"}, tmp_path)
    assert run_name(None, "m", said) == "from-env"
    assert run_name("r", "m", said) == "r"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('remot = "x"', "'remot' is not a setting (did you mean 'remote'? known: local, "),
        ("[config]\ndeadline = 3", "'config.deadline' is not a setting (did you mean 'deadline_s'? known: "),
        ('[config]\ndeadline_s = "soon"', "StoreConfig: deadline_s: Input should be a valid number"),
        ("[config]\nnothing_like_it = 1", "'config.nothing_like_it' is not a setting (known: "),
    ],
)
def test_a_mistake_in_the_file_is_named_with_the_file(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "ckptstore.toml").write_text(text)
    with pytest.raises(ConfigError) as found:
        Settings.read({}, tmp_path).config()
    assert f"{tmp_path / 'ckptstore.toml'}: {said}" in str(found.value)


def test_what_continues_a_job_is_a_command_except_where_somebody_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.orig_argv", ["python", "train.py", "--name", "my run"])
    assert command() == "continue with: python train.py --name 'my run'"
    monkeypatch.setattr("builtins.__IPYTHON__", True, raising=False)
    assert command() == "continue by running this again"


def test_arguments_count_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    (tmp_path / "ckptstore.toml").write_text(
        """
        local = "from-file"
        remote = "mem://from-file"
        run = "from-file"
        [config]
        pack_bytes = 2000000
        deadline_s = 7
        compress = false
        """
    )
    environ = {
        "CKPTSTORE_REMOTE": "mem://from-env",
        "CKPTSTORE_CONFIG__DEADLINE_S": "8",
        "CKPTSTORE_CONFIG__GENERATIONS": "1",
    }
    settings = Settings.read(environ, tmp_path)

    def opened(save_dir: Path | None = None, **given: Any) -> CheckpointStore:
        arguments = {"run": None, "model_name": "m", "remote": None, "config": None, **given}
        return open_store(save_dir, process_group=None, settings=settings, **arguments)

    store = opened(tmp_path / "given", config=StoreConfig(generations=2))
    config = store.config
    assert (config.pack_bytes, config.deadline_s, config.compress, config.generations) == (2_000_000, 8, False, 2)
    assert (store.local, store.run, store.remotes) == (tmp_path / "given", "from-file", {"mem": "mem://from-env"})
    assert opened().local == Path("from-file").absolute()
    assert opened(remote="mem://given", run="given").run == "given"
    with pytest.raises(ConfigError, match="either save_dir or store"):
        open_store(
            None,
            run=None,
            model_name=None,
            remote=None,
            config=None,
            process_group=None,
            settings=Settings.read({}, tmp_path / "x"),
        )


def test_signals_that_cannot_be_caught_are_refused() -> None:
    assert check_signals(["SIGTERM", "SIGTERM"]) == ("SIGTERM",)
    for wrong in ("SIGKILL", "TERM", "SIG_DFL"):
        with pytest.raises(ConfigError, match=wrong):
            check_signals([wrong])

"""Part of a checkpoint: only its bytes are fetched, and a target that doesn't fit stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptstore import CheckpointStore
from ckptstore.blob import open_blob_store
from ckptstore.dcp.loader import load_into
from ckptstore.dcp.reading import read_state
from ckptstore.errors import IntegrityError, LoadMismatchError
from ckptstore.ops.open import RunTiers
from ckptstore.ops.transfer import restore
from ckptstore.repo.catalog import Catalog
from ckptstore.repo.reader import CheckpointReader
from ckptstore.repo.remote import RemoteTier
from ckptstore.testing.watched import WatchedBlobStore
from ckptstore.types import LoadReport


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.Linear(512, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        model(torch.randn(8, 256)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A remote with one full AdamW state."""
    folder = tmp_path_factory.mktemp("partial")
    model, optimizer = trained()
    url = f"file://{folder}/bucket"
    with CheckpointStore(folder / "store", remote=url) as store:
        store.save({"model": model, "optimizer": optimizer, "epoch": 3}, 10, wait="remote")
    return url


class Watched:
    """The bucket behind a store that counts what is read from it."""

    def __init__(self, url: str) -> None:
        self.blob = WatchedBlobStore(open_blob_store(url))
        self.remote = RemoteTier(self.blob, "default", "s3")
        record = Catalog.read(None, [self.remote], "default").resolve("latest")
        self.reader = CheckpointReader(record, None, [self.remote])
        self.blob.requests.clear()

    @property
    def fetched_bytes(self) -> int:
        return self.blob.sent_bytes("get", "/packs/")

    def stored_bytes(self, prefix: str) -> int:
        """Size of the frames of the tensors below a prefix."""
        total = 0
        for ref in self.reader.root.shards:
            document = self.remote.remote_shard(self.reader.root.summary.save_id, ref)
            for piece, row in zip(document.shard.pieces, document.chunks, strict=True):
                if piece.fqn.startswith(prefix):
                    total += sum(document.frames[index].length for index in row)
        return total

    def load(self, state: dict[str, Any], **options: Any) -> LoadReport:
        return load_into(state, self.reader, **options)


@pytest.fixture
def watched(bucket: str) -> Watched:
    return Watched(bucket)


def test_only_the_models_bytes_are_fetched_when_only_it_is_wanted(watched: Watched) -> None:
    model, optimizer = trained(seed=1)
    expected, _ = trained()
    before = {name: value.clone() for name, value in optimizer.state[model[0].weight].items()}
    watched.load({"model": model, "optimizer": optimizer, "epoch": 0}, only=["model.*"])
    assert 0 < watched.fetched_bytes <= 1.05 * watched.stored_bytes("model.")
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    for name, value in optimizer.state[model[0].weight].items():
        assert torch.equal(value, before[name])


def test_one_glob_need_not_be_put_in_a_list(watched: Watched) -> None:
    model, optimizer = trained(seed=1)
    watched.load({"model": model, "optimizer": optimizer}, only="model.*")
    assert watched.fetched_bytes == watched.stored_bytes("model."), "its letters are no globs, though one is *"
    assert list(read_state(watched.reader, only="model.*")) == ["model"]


def test_a_target_without_optimizer_costs_only_the_models_bytes(watched: Watched) -> None:
    watched.load({"model": trained(seed=1)[0]})
    assert 0 < watched.fetched_bytes <= 1.05 * watched.stored_bytes("model.")


def test_one_parameter_costs_its_own_bytes(watched: Watched) -> None:
    watched.load({"model": trained(seed=1)[0]}, only=["model.2.bias"])
    assert watched.fetched_bytes == watched.stored_bytes("model.2.bias")


def test_a_restore_of_a_part_fetches_only_that(watched: Watched, tmp_path: Path) -> None:
    before = watched.fetched_bytes
    restored = restore(RunTiers("default", None, (watched.remote,)), "latest", tmp_path / "w", only=["model.*"])
    assert watched.fetched_bytes - before == watched.stored_bytes("model.")
    assert restored.info.size_bytes == sum(p.numel() * 4 for p in trained()[0].parameters())


def test_read_fetches_only_what_the_globs_let_through(watched: Watched) -> None:
    from ckptstore.dcp.reading import read_state

    state = read_state(watched.reader, only=["model.0.*", "epoch"])
    assert set(state) == {"model", "epoch"}
    assert set(state["model"]) == {"0.weight", "0.bias"}
    assert watched.fetched_bytes == watched.stored_bytes("model.0.")


def test_stored_prefixes_are_mapped_to_the_targets_names(watched: Watched) -> None:
    wrapper = nn.Module()
    wrapper.net = trained(seed=1)[0]
    report = watched.load({"backbone": wrapper}, rename={"model.": "backbone.net."})
    assert torch.equal(wrapper.net[0].weight, trained()[0][0].weight)
    assert report.renamed == {"model": "backbone.net"}


def test_part_of_a_module_goes_elsewhere_when_its_prefix_is_renamed(watched: Watched) -> None:
    state = {"model": {"first": nn.Linear(256, 512)}}
    report = watched.load(state, rename={"model.0.": "model.first."}, strict=False)
    assert torch.equal(state["model"]["first"].weight, trained()[0][0].weight)
    assert "model.2.weight" in report.unexpected


@pytest.mark.parametrize("wrap", ["module", "_orig_mod"])
def test_wrapper_prefixes_of_the_target_do_not_matter(watched: Watched, wrap: str) -> None:
    model = trained(seed=1)[0]
    wrapper = nn.Module()
    setattr(wrapper, wrap, model)
    report = watched.load({"model": wrapper})
    assert (report.missing, report.unexpected) == ((), ())
    assert torch.equal(model[0].weight, trained()[0][0].weight)


def test_nothing_changes_and_all_of_it_is_listed_when_the_target_does_not_fit(watched: Watched) -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 500), nn.Linear(512, 64), nn.Linear(64, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {"model": model, "epoch": -1}
    with pytest.raises(LoadMismatchError) as caught:
        watched.load(state)
    message = str(caught.value)
    for part in ("model.2.weight", "[512, 512]", "[500, 512]", "model.4.weight"):
        assert part in message
    assert caught.value.context["missing"] == ["model.4.weight", "model.4.bias"]
    assert watched.fetched_bytes == 0
    assert state["epoch"] == -1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_lenient_loads_say_what_they_did(watched: Watched) -> None:
    model = nn.Sequential(nn.Linear(256, 512).double(), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(64, 2))
    report = watched.load({"model": model}, strict=False)
    assert report.missing == ("model.4.weight", "model.4.bias")
    assert report.unexpected == ("model.3.weight", "model.3.bias")
    assert report.cast == {"model.0.weight": ("float32", "float64"), "model.0.bias": ("float32", "float64")}
    assert torch.equal(model[0].weight, trained()[0][0].weight.double())


def test_the_keys_already_changed_are_named_when_damage_is_found_later(bucket: str) -> None:
    watched = Watched(bucket)
    document = watched.remote.remote_shard(watched.reader.root.summary.save_id, watched.reader.root.shards[0])
    index = next(i for i, piece in enumerate(document.shard.pieces) if piece.fqn == "model.3.weight")
    frame = document.frames[document.chunks[index][0]]
    get = watched.blob.inner.get

    def flip(key: str, *, start: int = 0, length: int | None = None, max_bytes: int | None = None) -> bytes:
        data = bytearray(get(key, start=start, length=length, max_bytes=max_bytes))
        at = frame.offset + frame.length // 2 - start
        if key.endswith(document.packs[frame.pack]) and 0 <= at < len(data):
            data[at] ^= 1
        return bytes(data)

    watched.blob.inner.get = flip  # type: ignore[method-assign]
    with pytest.raises(IntegrityError, match=r"model\.3\.weight") as caught:
        watched.load({"model": trained(seed=1)[0], "epoch": 0}, threads=1)
    assert "model.0.weight" in caught.value.context["changed"]

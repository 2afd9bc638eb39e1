"""Checkpoints assembled without torch, opened with stock torch.distributed.checkpoint."""

from __future__ import annotations

import ctypes
import dataclasses
import io
import itertools
import math
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ckptstore.errors import FormatError
from ckptstore.format import stock, tree
from ckptstore.format.dtypes import DTYPES
from ckptstore.format.manifest import Piece, ShardManifest, Summary, TensorMeta, root_of
from ckptstore.format.stock import PieceSpec

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")

SAVE_ID = "0123456789ab-1"
KIB = 1024

Box = tuple[int, tuple[int, ...], tuple[int, ...]]
"""rank, offsets, shape"""


def whole(_: str, tensor: torch.Tensor) -> list[Box]:
    return [(0, (0,) * tensor.dim(), tuple(tensor.shape))]


def rows_over(ranks: int) -> Callable[[str, torch.Tensor], list[Box]]:
    """As Shard(0) does it: the first ranks get ceil(n / ranks) rows, the last ones fewer or none."""

    def boxes(_: str, tensor: torch.Tensor) -> list[Box]:
        if tensor.dim() == 0:
            return [(0, (), ())]
        rows = tensor.shape[0]
        each = math.ceil(rows / ranks)
        cuts = [(r, min(r * each, rows), min((r + 1) * each, rows)) for r in range(ranks)]
        rest = tuple(tensor.shape[1:])
        return [(r, (low, *(0 for _ in rest)), (high - low, *rest)) for r, low, high in cuts]

    return boxes


def raw(tensor: torch.Tensor) -> bytes:
    """The row-major bytes of any tensor, of any dtype."""
    dense = tensor.detach().contiguous()
    return ctypes.string_at(dense.data_ptr(), dense.nbytes) if dense.nbytes else b""


class Checkpoint:
    """A checkpoint directory, with the manifests it was made from."""

    def __init__(
        self,
        path: Path,
        state: dict[str, Any],
        boxes: Callable[[str, torch.Tensor], list[Box]] = whole,
        *,
        ranks: int = 1,
        aliases: dict[str, str] | None = None,
    ) -> None:
        self.path = path
        self.tensors: dict[str, torch.Tensor] = {}
        aliases = aliases or {}

        def leaf(where: tuple[Any, ...], value: object) -> object:
            if not isinstance(value, torch.Tensor):
                return value
            name = ".".join(map(str, where))
            self.tensors[name] = value
            return tree.TensorRef(name)

        encoded = tree.encode(state, leaf)
        path.mkdir()
        self.shards = []
        for rank in range(ranks):
            specs, payloads = [], []
            for name, tensor in self.tensors.items():
                for owner, offsets, shape in boxes(name, tensor) if name not in aliases else []:
                    if owner == rank:
                        dtype = str(tensor.dtype).removeprefix("torch.")
                        box = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))]
                        specs.append(PieceSpec(name, dtype, tuple(tensor.shape), offsets, shape, tensor.requires_grad))
                        payloads.append(raw(box))
            self.shards.append(self._write(rank, ranks, specs, payloads, encoded if rank == 0 else None, aliases))
        (path / ".metadata").write_bytes(stock.metadata(root_of(self.shards), self.shards))

    def _write(
        self,
        rank: int,
        ranks: int,
        specs: Sequence[PieceSpec],
        payloads: Sequence[bytes],
        encoded: dict[str, Any] | None,
        aliases: dict[str, str],
    ) -> ShardManifest:
        image = stock.layout(specs)
        content = bytearray(image.image_bytes)
        for offset, data in image.segments:
            content[offset : offset + len(data)] = data
        for start, data in zip(image.starts, payloads, strict=True):
            content[start : start + len(data)] = data
        if encoded is not None:
            content += stock.tail(stock.stock_items(encoded), image.image_bytes)[0]
        file = f"__{rank}_0.distcp"
        (self.path / file).write_bytes(content)
        return ShardManifest(
            save_id=SAVE_ID,
            step=1,
            rank=rank,
            world_size=ranks,
            file=file,
            file_bytes=len(content),
            chunk_elements=1 << 20,
            pieces=tuple(
                Piece(fqn=s.fqn, offsets=s.offsets, shape=s.shape, start=start, size_bytes=s.size_bytes)
                for s, start in zip(specs, image.starts, strict=True)
            ),
            tensors={
                s.fqn: TensorMeta(dtype=s.dtype, shape=s.global_shape, requires_grad=s.requires_grad) for s in specs
            },
            summary=summary(ranks) if rank == 0 else None,
            tree=encoded,
            aliases=aliases if rank == 0 else {},
        )

    def torch_loaded(self) -> dict[str, Any]:
        """What dcp_to_torch_save makes of it."""
        out = self.path.with_suffix(".pt")
        dcp_to_torch_save(self.path, out)
        return torch.load(out, weights_only=False)  # type: ignore[no-any-return]


def summary(ranks: int) -> Summary:
    return Summary(
        run="run", save_id=SAVE_ID, timeline=1, step=1, created_at="2026-01-01T00:00:00Z", job="j", world_size=ranks
    )


def stock_saved(path: Path, state: dict[str, Any]) -> Path:
    dcp.save(state, checkpoint_id=path, no_dist=True)
    return path


def read_metadata(path: Path) -> Metadata:
    return dcp.FileSystemReader(path).read_metadata()


def same(a: Any, b: Any) -> bool:
    """Equal in type and value, tensors bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or (a != a and b != b)


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * DTYPES[dtype].itemsize
    data = torch.randint(0, 2 if dtype == "bool" else 256, (size,), dtype=torch.uint8, generator=generator)
    return torch.empty(shape, dtype=getattr(torch, dtype)).set_(data.untyped_storage(), 0, shape)


def training_state() -> dict[str, Any]:
    """Nested like a trainer's: model by fqn, optimizer by fqn, groups, counters."""
    torch.manual_seed(0)
    model = {
        "embed.weight": torch.randn(300, 64),
        "layers.0.weight": torch.randn(64, 64, dtype=torch.bfloat16),
        "layers.0.bias": torch.randn(64, requires_grad=True),
        "norm.num_batches_tracked": torch.tensor(7),
        "empty": torch.empty(0, 5),
    }
    moments = {
        name: {"exp_avg": torch.randn(p.shape), "exp_avg_sq": torch.rand(p.shape), "step": torch.tensor(3.0)}
        for name, p in model.items()
        if p.is_floating_point()
    }
    groups = [
        {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "maximize": False, "foreach": None, "params": list(moments)},
        {"lr": 5e-4, "betas": (0.9, 0.95), "eps": 1e-8, "maximize": True, "foreach": None, "params": []},
    ]
    return {
        "model": model,
        "optim": {"state": moments, "param_groups": groups},
        "scheduler": OrderedDict(last_epoch=3, _last_lr=[1e-3, 5e-4], base=b"\x00\xff"),
        "history": [{"loss": 0.5}, {"loss": float("inf")}],
        "mixed": [torch.arange(3), 5, "x", [torch.ones(2)]],
        "nested lists": [[1, 2], [3, [4, "five"]]],
        "steps": {0: "zero", 17: 2**70, "none": None},
        "epoch": 3,
    }


class TestStockReaderOpensOurs:
    def test_dcp_load_gives_the_saved_values_when_the_target_is_nested(self, tmp_path: Path) -> None:
        saved = training_state()
        Checkpoint(tmp_path / "ours", saved)
        target = training_state()
        for leaf in _tensors(target):
            leaf.detach().zero_()
        target["epoch"] = 0
        target["optim"]["param_groups"][0].update(lr=0.0, betas=None)
        target["scheduler"]["base"] = b""

        dcp.load(target, checkpoint_id=tmp_path / "ours", no_dist=True)

        assert same(target["model"], saved["model"])
        assert same(target["optim"], saved["optim"])
        assert same(target["scheduler"], saved["scheduler"])
        assert target["epoch"] == 3

    def test_conversion_equals_that_of_a_stock_checkpoint_when_the_state_is_the_same(self, tmp_path: Path) -> None:
        ours = Checkpoint(tmp_path / "ours", training_state())
        theirs = stock_saved(tmp_path / "theirs", training_state())
        dcp_to_torch_save(theirs, tmp_path / "theirs.pt")

        assert same(ours.torch_loaded(), torch.load(tmp_path / "theirs.pt", weights_only=False))

    def test_metadata_equals_that_of_a_stock_checkpoint_when_the_state_is_the_same(self, tmp_path: Path) -> None:
        Checkpoint(tmp_path / "ours", training_state())
        ours = read_metadata(tmp_path / "ours")
        theirs = read_metadata(stock_saved(tmp_path / "theirs", training_state()))

        assert list(ours.state_dict_metadata) == list(theirs.state_dict_metadata)
        assert ours.state_dict_metadata == theirs.state_dict_metadata
        assert ours.planner_data == theirs.planner_data
        assert ours.version == theirs.version
        assert set(ours.storage_data) == set(theirs.storage_data)
        hints = {index: index.index for index in theirs.storage_data}
        assert {index: index.index for index in ours.storage_data} == hints
        assert {f.name for f in dataclasses.fields(Metadata)} == set(vars(ours))

    @pytest.mark.parametrize("ranks", [2, 3])
    def test_sharded_tensors_come_back_whole_when_each_rank_wrote_its_rows(self, tmp_path: Path, ranks: int) -> None:
        saved = training_state()
        Checkpoint(tmp_path / "ours", saved, rows_over(ranks), ranks=ranks)
        target = training_state()
        for leaf in _tensors(target):
            leaf.detach().zero_()

        dcp.load(target, checkpoint_id=tmp_path / "ours", no_dist=True)

        # DCP puts values under the text of their keys, so those below int keys land beside the target's.
        assert same(target | {"steps": None}, saved | {"steps": None})

    def test_shards_and_one_file_convert_to_the_same_when_the_state_is_the_same(self, tmp_path: Path) -> None:
        one = Checkpoint(tmp_path / "one", training_state())
        two = Checkpoint(tmp_path / "two", training_state(), rows_over(2), ranks=2)

        assert same(one.torch_loaded(), two.torch_loaded())

    @pytest.mark.parametrize("dtype", sorted(DTYPES))
    def test_every_dtype_comes_back_bit_for_bit_when_read_as_one_item(self, tmp_path: Path, dtype: str) -> None:
        known = DTYPES[dtype]
        for seed, shape in enumerate([(), (0,), (3, 0, 2), (5,), (2, 3, 4), (40_000,)]):
            tensor = random_tensor(known.stock_dtype, shape, seed)
            spec = PieceSpec("t", dtype, shape, (0,) * len(shape), shape)
            image = stock.layout([spec])
            (_, head), (_, foot) = image.segments

            loaded = torch.load(io.BytesIO(head + raw(tensor) + foot), weights_only=True)

            assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
            assert loaded.stride() == torch.empty(shape).stride()
            assert not loaded.requires_grad
            assert raw(loaded) == raw(tensor)

    def test_mixed_dtypes_load_through_dcp_when_sizes_cross_the_page_threshold(self, tmp_path: Path) -> None:
        dtypes = [d for d, known in DTYPES.items() if known.stock_dtype == d and known.kind != "bits"]
        dtypes.remove("float4_e2m1fn_x2")  # torch has no copy kernel for it, so stock dcp.load can't fill one
        saved = {
            f"{dtype}/{size}": random_tensor(dtype, shape, seed)
            for seed, dtype in enumerate(dtypes)
            for size, shape in {"scalar": (), "small": (3, 5), "large": (70_001,)}.items()
        }
        Checkpoint(tmp_path / "ours", saved)
        target = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}

        dcp.load(target, checkpoint_id=tmp_path / "ours", no_dist=True)

        assert same(target, saved)

    def test_both_names_load_when_tensors_are_tied(self, tmp_path: Path) -> None:
        weight = torch.randn(20, 30)
        state = {"model": {"embed.weight": weight, "head.weight": weight}}
        ours = Checkpoint(
            tmp_path / "ours", state, rows_over(2), ranks=2, aliases={"model.head.weight": "model.embed.weight"}
        )

        assert same(ours.torch_loaded(), state)
        assert sum(p.size_bytes for s in ours.shards for p in s.pieces) == weight.nbytes
        places = read_metadata(ours.path).storage_data
        assert len({(p.relative_path, p.offset) for p in places.values()}) == 2
        assert len(places) == 4

    def test_both_paths_load_when_they_refer_to_one_tensor(self, tmp_path: Path) -> None:
        (shard,) = Checkpoint(tmp_path / "ours", {"a": {"w": torch.ones(3)}, "b": 1}).shards
        state = tree.encode({"a": {"w": tree.TensorRef("a.w")}, "b": tree.TensorRef("a.w")}, lambda _, value: value)
        shared = shard.model_copy(update={"tree": state})

        (tmp_path / "ours" / ".metadata").write_bytes(stock.metadata(root_of([shared]), [shared]))
        dcp_to_torch_save(tmp_path / "ours", tmp_path / "all.pt")

        assert same(torch.load(tmp_path / "all.pt"), {"a": {"w": torch.ones(3)}, "b": torch.ones(3)})

    def test_each_box_is_listed_once_when_two_nodes_kept_a_replica(self, tmp_path: Path) -> None:
        weight = torch.randn(4, 3)
        ours = Checkpoint(
            tmp_path / "ours", {"w": weight}, lambda _, t: [(0, (0, 0), (4, 3)), (1, (0, 0), (4, 3))], ranks=2
        )

        found = read_metadata(ours.path).state_dict_metadata["w"]

        assert isinstance(found, TensorStorageMetadata)
        assert len(found.chunks) == 1
        assert same(ours.torch_loaded(), {"w": weight})

    def test_sub_byte_integers_read_as_uint8_when_torch_save_cannot_hold_them(self, tmp_path: Path) -> None:
        packed = torch.arange(16, dtype=torch.uint8)
        ours = Checkpoint(tmp_path / "ours", {"w": packed.view(torch.uint4)})

        assert same(ours.torch_loaded(), {"w": packed})

    def test_metadata_is_the_same_when_the_shards_come_in_another_order(self, tmp_path: Path) -> None:
        ours = Checkpoint(tmp_path / "ours", training_state(), rows_over(3), ranks=3)

        again = stock.metadata(root_of(ours.shards), ours.shards[::-1])

        assert again == (ours.path / ".metadata").read_bytes()

    def test_metadata_is_refused_when_a_tensor_of_the_state_has_no_bytes(self, tmp_path: Path) -> None:
        (shard,) = Checkpoint(tmp_path / "ours", training_state()).shards
        lost = shard.model_copy(update={"pieces": shard.pieces[1:]})

        with pytest.raises(FormatError, match=shard.pieces[0].fqn):
            stock.metadata(root_of([shard]), [lost])

    def test_tensors_of_single_ranks_are_left_out_when_they_are_not_in_the_state(self, tmp_path: Path) -> None:
        (shard,) = Checkpoint(tmp_path / "ours", {"w": torch.ones(3), "rng@rank0": torch.ones(2)}).shards
        state = tree.encode({"w": tree.TensorRef("w"), "rng": tree.PerRankRef("rng")}, lambda _, value: value)
        own = shard.model_copy(update={"tree": state})

        (tmp_path / "ours" / ".metadata").write_bytes(stock.metadata(root_of([own]), [own]))

        assert list(read_metadata(tmp_path / "ours").state_dict_metadata) == ["w"]

    def test_metadata_is_refused_when_rank_0_is_missing(self, tmp_path: Path) -> None:
        ours = Checkpoint(tmp_path / "ours", training_state(), rows_over(2), ranks=2)

        with pytest.raises(FormatError, match="rank 0"):
            stock.metadata(root_of(ours.shards), ours.shards[1:])


class TestArchive:
    def test_archives_over_4_gib_open_when_mapped(self, tmp_path: Path) -> None:
        size = (1 << 32) + 12_345
        (_, head), (_, foot) = stock.layout([PieceSpec("w", "uint8", (size,), (0,), (size,))]).segments
        path = tmp_path / "large.pt"
        with path.open("wb") as file:
            file.write(head)
            file.seek(len(head) + size - 1)
            file.write(b"\x07")
            file.write(foot)

        loaded = torch.load(path, mmap=True, weights_only=True)

        assert loaded.shape == (size,)
        assert (loaded[0], loaded[-1]) == (0, 7)

    def test_only_the_payload_checksum_is_wrong_when_zipfile_looks(self) -> None:
        import zipfile

        (_, head), (_, foot) = stock.layout([PieceSpec("w", "uint8", (3,), (0,), (3,))]).segments
        archive = zipfile.ZipFile(io.BytesIO(head + b"abc" + foot))

        assert archive.testzip() == "archive/data/0"
        small = [name for name in archive.namelist() if name != "archive/data/0"]
        assert [archive.read(name)[-8:] for name in small[1:]] == [b"little", b"3\n"]
        assert archive.getinfo("archive/data/0").file_size == 3

    def test_items_open_without_their_payload_when_mapped_to_meta(self) -> None:
        (_, head), (_, foot) = stock.layout([PieceSpec("w", "int16", (3, 2), (0, 0), (3, 2))]).segments

        loaded = torch.load(io.BytesIO(head + bytes(12) + foot), map_location="meta", weights_only=True)

        assert (loaded.shape, loaded.dtype) == ((3, 2), torch.int16)
        assert loaded.untyped_storage()._checkpoint_offset == len(head)


class TestLayout:
    def test_payloads_are_aligned_and_apart_when_sizes_vary(self) -> None:
        sizes = [0, 1, 63, 64 * KIB, 64 * KIB + 1, 5, 1 << 20, 0]
        specs = [PieceSpec(f"p{i}", "uint8", (n,), (0,), (n,)) for i, n in enumerate(sizes)]

        image = stock.layout(specs)

        assert [start % 64 for start in image.starts] == [0] * len(sizes)
        assert [start % 4096 for start, n in zip(image.starts, sizes, strict=True) if n > 64 * KIB] == [0, 0]
        spans = sorted(
            [(o, o + len(d)) for o, d in image.segments]
            + [(s, s + n) for s, n in zip(image.starts, sizes, strict=True)]
        )
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert all(b[0] - a[1] < 4096 for a, b in itertools.pairwise(spans))
        assert spans[-1][1] == image.image_bytes
        assert [o + len(d) for o, d in image.segments[::2]] == list(image.starts)

    def test_ten_thousand_pieces_take_under_a_third_of_a_second_when_shapes_repeat(self) -> None:
        specs = [PieceSpec(f"layers.{i}", "float32", (i % 40 + 1, 7), (0, 0), (i % 40 + 1, 7)) for i in range(10_000)]
        began = time.perf_counter()

        stock.layout(specs)

        assert time.perf_counter() - began < 0.3

    def test_layout_is_empty_when_there_are_no_pieces(self) -> None:
        assert stock.layout([]) == stock.Layout((), (), 0)

    def test_unknown_dtypes_are_refused_when_laid_out(self) -> None:
        with pytest.raises(FormatError, match="qint8"):
            stock.layout([PieceSpec("w", "qint8", (3,), (0,), (3,))])


class TestSkeleton:
    @pytest.mark.parametrize("ranks", [1, 2, 3])
    def test_skeleton_and_payloads_are_the_file_when_the_manifest_went_through_json(
        self, tmp_path: Path, ranks: int
    ) -> None:
        state = training_state() | {"large": torch.randn(200, 300)}
        ours = Checkpoint(tmp_path / "ours", state, rows_over(ranks), ranks=ranks)
        for shard in ours.shards:
            read = ShardManifest.decode(shard.encode(), what="shard")
            original = (ours.path / shard.file).read_bytes()
            rebuilt = bytearray(b"\xaa" * shard.file_bytes)
            for piece in shard.pieces:
                rebuilt[piece.start : piece.start + piece.size_bytes] = original[piece.start :][: piece.size_bytes]
            end = 0
            written = sum(piece.size_bytes for piece in shard.pieces)
            for offset, data in stock.skeleton(read):
                assert offset >= end
                end = offset + len(data)
                written += len(data)
                rebuilt[offset:end] = data

            assert bytes(rebuilt) == original
            assert written == shard.file_bytes

    def test_metadata_is_the_same_when_the_manifest_went_through_json(self, tmp_path: Path) -> None:
        ours = Checkpoint(tmp_path / "ours", training_state(), rows_over(2), ranks=2)
        read = [ShardManifest.decode(shard.encode(), what="shard") for shard in ours.shards]

        assert stock.metadata(root_of(read), read) == (ours.path / ".metadata").read_bytes()

    def test_manifests_are_refused_when_their_places_are_not_the_layouts(self, tmp_path: Path) -> None:
        (shard,) = Checkpoint(tmp_path / "ours", training_state()).shards
        first = shard.pieces[0]
        moved = first.model_copy(update={"start": first.start + 64})
        for wrong in (
            {"pieces": (moved, *shard.pieces[1:])},
            {"pieces": shard.pieces[::-1]},
            {"file_bytes": shard.file_bytes + 1},
            {"tensors": {}},
            {"pieces": (first.model_copy(update={"shape": (-1,)}), *shard.pieces[1:])},
            {"pieces": (first.model_copy(update={"shape": (1 << 70,), "size_bytes": 1 << 72}), *shard.pieces[1:])},
            {"pieces": (first.model_copy(update={"size_bytes": first.size_bytes + 4}), *shard.pieces[1:])},
        ):
            with pytest.raises(FormatError):
                stock.skeleton(shard.model_copy(update=wrong))

    def test_nothing_is_yielded_when_a_rank_wrote_nothing(self) -> None:
        shard = ShardManifest(
            save_id=SAVE_ID, step=1, rank=1, world_size=2, file="__1_0.distcp", file_bytes=0, chunk_elements=1
        )

        assert list(stock.skeleton(shard)) == []


def golden_state() -> dict[str, Any]:
    """Small, and with one of each: dtypes of both pickle forms, page and cache-line alignment, every kind of leaf."""
    return {
        "model": {
            "w": torch.arange(6, dtype=torch.float32).reshape(3, 2).requires_grad_(),
            "scale": torch.arange(8, dtype=torch.uint8).view(torch.float8_e4m3fn),
            "paged": torch.zeros(140, 1000, dtype=torch.uint8),
            "count": torch.tensor(7),
            "empty": torch.empty(0, 3, dtype=torch.bfloat16),
            "tied": torch.arange(6, dtype=torch.float32).reshape(3, 2),
        },
        "optim": {"state": {0: {"step": 1.5}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": ["w"]}]},
        "plain": [None, True, -1, 2**80, "é", b"\x00\xff", {3, 1}, (), [float("-inf")]],
        "epoch": 3,
    }


GOLDEN = Path(__file__).parents[2] / "compat" / "stock_v1"


class TestGolden:
    """The bytes of format 1: checkpoints out there depend on every one of them."""

    def test_bytes_are_those_of_version_1_when_written_today(self, tmp_path: Path) -> None:
        ours = Checkpoint(tmp_path / "ours", golden_state(), rows_over(2), ranks=2, aliases={"model.tied": "model.w"})

        assert sorted(p.name for p in GOLDEN.iterdir()) == sorted(p.name for p in ours.path.iterdir())
        for file in GOLDEN.iterdir():
            assert (ours.path / file.name).read_bytes() == file.read_bytes(), file.name

    def test_golden_files_open_in_stock_when_read_with_this_torch(self, tmp_path: Path) -> None:
        dcp_to_torch_save(GOLDEN, tmp_path / "all.pt")
        expected = golden_state()
        expected["optim"]["state"] = {"0": {"step": 1.5}}  # as DCP turns every key into text

        assert same(torch.load(tmp_path / "all.pt", weights_only=False), expected)


def test_torch_is_not_imported_when_a_checkpoint_is_written(tmp_path: Path) -> None:
    ours = Checkpoint(tmp_path / "ours", training_state(), rows_over(2), ranks=2)
    for shard in ours.shards:
        (tmp_path / f"{shard.rank}.json").write_bytes(shard.encode())
    program = f"""
import sys
from pathlib import Path
from ckptstore.format import stock
from ckptstore.format.manifest import ShardManifest, root_of
root = Path({str(tmp_path)!r})
shards = [ShardManifest.decode((root / f"{{r}}.json").read_bytes(), what="shard") for r in range(2)]
for shard in shards:
    list(stock.skeleton(shard))
    stock.layout(stock.specs_of(shard))
assert stock.metadata(root_of(shards), shards) == (root / "ours" / ".metadata").read_bytes()
assert "torch" not in sys.modules
assert "numpy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value)

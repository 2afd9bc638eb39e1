"""The contract of a blob store, as tests. Every store passes them against a real server.

Subclass it, and give it a store::

    class TestMyStore(BlobStoreTests):
        @pytest.fixture
        def store(self):
            store = MyStore(...)          # empty, and nobody else's
            yield store
            store.close()

Stores with buckets, which may be missing, subclass :class:`BucketStoreTests` and give ``store_without_bucket`` as well.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from random import Random

import pytest

from ckptstore.blob.base import BlobStore
from ckptstore.errors import CheckpointExistsError, ConfigError, IntegrityError, NoStoreError, NotFoundError

_BODY = b"0123456789"


def _bytes(size_bytes: int) -> bytes:
    return Random(size_bytes).randbytes(size_bytes)  # noqa: S311 - no secret


class BlobStoreTests:
    """What :class:`~ckptstore.blob.base.BlobStore` promises.

    Attributes:
        large_bytes: Size of a body that the store sends in parts.
        num_many: Number of objects that takes several pages to list and several batches to delete.
    """

    large_bytes = 11 * 1024**2 + 7
    num_many = 1_050

    @pytest.fixture
    def store(self) -> Iterator[BlobStore]:
        """An empty store of one's own."""
        raise NotImplementedError("give this class a `store` fixture")

    # put and get

    @pytest.mark.parametrize("size_bytes", [0, 1, 4097, 1024**2 + 3])
    def test_get_returns_what_was_put_when_sizes_differ(self, store: BlobStore, size_bytes: int) -> None:
        body = _bytes(size_bytes)
        store.put("a/b-c_d.E/0", body)
        assert store.get("a/b-c_d.E/0") == body

    def test_get_returns_what_was_put_when_the_body_is_large(self, store: BlobStore) -> None:
        body = _bytes(self.large_bytes)
        store.put("large", memoryview(body))
        assert store.get("large") == body
        assert store.get("large", start=self.large_bytes - 9, length=9) == body[-9:]
        info = store.head("large")
        assert info is not None
        assert info.size_bytes == self.large_bytes

    @pytest.mark.parametrize("make", [bytes, bytearray, memoryview])
    def test_put_takes_any_buffer_when_it_is_contiguous(self, store: BlobStore, make: Callable[[bytes], bytes]) -> None:
        buffer = make(_BODY)
        store.put("buffer", buffer)
        assert store.get("buffer") == _BODY
        assert buffer == _BODY

    def test_put_stores_the_bytes_when_the_buffer_has_another_format(self, store: BlobStore) -> None:
        store.put("wide", memoryview(bytearray(_BODY * 4)).cast("I"))
        assert store.get("wide") == _BODY * 4

    def test_put_keeps_nothing_of_the_buffer_when_it_changes_afterwards(self, store: BlobStore) -> None:
        buffer = bytearray(_BODY)
        store.put("kept", buffer)
        buffer[:] = b"x" * len(buffer)
        assert store.get("kept") == _BODY

    def test_put_replaces_when_the_object_exists(self, store: BlobStore) -> None:
        store.put("twice", b"first, and longer")
        store.put("twice", b"second")
        assert store.get("twice") == b"second"

    def test_get_raises_not_found_when_the_object_is_absent(self, store: BlobStore) -> None:
        store.put("folder/there", _BODY)
        for key in ("absent", "folder", "folder/absent", "folder/there.not"):
            with pytest.raises(NotFoundError):
                store.get(key)
            with pytest.raises(NotFoundError):
                store.get(key, start=1, length=2)
            with pytest.raises(NotFoundError):
                store.get(key, length=0)

    # ranges

    @pytest.mark.parametrize(
        ("start", "length"),
        [(0, 10), (0, 1), (3, 4), (9, 1), (0, None), (4, None), (9, None), (10, None), (10, 0), (2, 0)],
    )
    def test_get_returns_the_range_when_it_lies_within(self, store: BlobStore, start: int, length: int | None) -> None:
        store.put("ranged", _BODY)
        assert store.get("ranged", start=start, length=length) == _BODY[start:][:length]

    @pytest.mark.parametrize(("start", "length"), [(0, 11), (9, 2), (10, 1), (11, None), (11, 0), (50, 5)])
    def test_get_refuses_when_the_range_reaches_past_the_end(
        self, store: BlobStore, start: int, length: int | None
    ) -> None:
        store.put("ranged", _BODY)
        with pytest.raises(IntegrityError):
            store.get("ranged", start=start, length=length)

    def test_get_returns_nothing_when_the_object_is_empty(self, store: BlobStore) -> None:
        store.put("empty", b"")
        assert store.get("empty") == b""
        assert store.get("empty", length=0) == b""
        with pytest.raises(IntegrityError):
            store.get("empty", length=1)

    def test_get_refuses_when_the_object_exceeds_max_bytes(self, store: BlobStore) -> None:
        store.put("bounded", _BODY)
        assert store.get("bounded", max_bytes=10) == _BODY
        with pytest.raises(IntegrityError):
            store.get("bounded", max_bytes=9)
        assert store.get("bounded", start=1, max_bytes=9) == _BODY[1:]

    # create only

    def test_put_if_absent_changes_nothing_when_the_object_exists(self, store: BlobStore) -> None:
        store.put("once", b"first", if_absent=True)
        for body in (b"second", b"first"):
            with pytest.raises(CheckpointExistsError):
                store.put("once", body, if_absent=True)
        assert store.get("once") == b"first"

    def test_put_if_absent_changes_nothing_when_the_body_is_large(self, store: BlobStore) -> None:
        body = _bytes(self.large_bytes)
        store.put("once", body, if_absent=True)
        with pytest.raises(CheckpointExistsError):
            store.put("once", bytes(self.large_bytes), if_absent=True)
        assert store.get("once") == body

    def test_put_if_absent_works_when_the_object_was_deleted(self, store: BlobStore) -> None:
        store.put("again", b"first", if_absent=True)
        store.delete(["again"])
        store.put("again", b"second", if_absent=True)
        assert store.get("again") == b"second"

    def test_exactly_one_writer_wins_when_many_put_if_absent(self, store: BlobStore) -> None:
        if not store.capabilities.conditional_put:
            pytest.skip("this store can't create atomically, and says so")
        for attempt in range(3):
            start = threading.Barrier(8)

            def write(writer: int, key: str = f"race-{attempt}", start: threading.Barrier = start) -> bool:
                start.wait()
                try:
                    store.put(key, b"%d" % writer, if_absent=True)
                except CheckpointExistsError:
                    return False
                return True

            with ThreadPoolExecutor(8) as pool:
                won = list(pool.map(write, range(8)))
            assert won.count(True) == 1
            assert store.get(f"race-{attempt}") == b"%d" % won.index(True)

    # head and list

    def test_head_tells_size_and_time_when_the_object_exists(self, store: BlobStore) -> None:
        store.put("seen/it", _BODY)
        info = store.head("seen/it")
        assert info is not None
        assert (info.key, info.size_bytes) == ("seen/it", 10)
        assert info.modified is not None
        assert abs(datetime.now(timezone.utc) - info.modified) < timedelta(minutes=5)

    def test_head_is_none_when_the_object_is_absent(self, store: BlobStore) -> None:
        store.put("folder/there", _BODY)
        for key in ("absent", "folder", "folder/absent", "folder/there/below"):
            assert store.head(key) is None

    def test_list_is_empty_when_nothing_was_put(self, store: BlobStore) -> None:
        assert list(store.list()) == []
        assert list(store.list("no/such/folder/")) == []

    def test_list_finds_exactly_the_prefix_when_names_are_similar(self, store: BlobStore) -> None:
        keys = {"run/1", "run-1/x", "run-10/x", "run-1.old/x", "run.1", "rum", "run-1/deep/er/still", "z"}
        for key in keys:
            store.put(key, key.encode())
        for prefix in ("", "r", "run", "run-1", "run-1/", "run-1/deep/", "run-1/deep/er/st", "run/", "zz", "run-1/x/"):
            assert sorted(info.key for info in store.list(prefix)) == sorted(k for k in keys if k.startswith(prefix))
        assert {info.key: info.size_bytes for info in store.list()} == {key: len(key) for key in keys}

    def test_list_and_delete_are_complete_when_there_are_many_objects(self, store: BlobStore) -> None:
        keys = [f"many/{number % 7}/{number:05d}" for number in range(self.num_many)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: store.put(key, b"."), keys))
        store.put("manyfold", b".")
        assert sorted(info.key for info in store.list("many/")) == sorted(keys)
        store.delete(keys)
        assert [info.key for info in store.list()] == ["manyfold"]

    # delete

    def test_delete_removes_exactly_the_keys_when_others_are_similar(self, store: BlobStore) -> None:
        for key in ("a/b", "a/bc", "a/c/d", "ab"):
            store.put(key, _BODY)
        store.delete(["a/b", "a/absent", "absent/too"])
        assert sorted(info.key for info in store.list()) == ["a/bc", "a/c/d", "ab"]
        store.delete(["a/b"])
        store.delete([])

    def test_abort_uploads_keeps_every_object_when_called(self, store: BlobStore) -> None:
        store.put("whole", _BODY)
        store.put("large", bytes(self.large_bytes))
        assert store.abort_uploads("", datetime.now(timezone.utc) + timedelta(minutes=5)) == 0
        assert sorted(info.key for info in store.list()) == ["large", "whole"]

    # many at once

    def test_readers_see_one_whole_body_when_an_object_is_replaced(self, store: BlobStore) -> None:
        bodies = {bytes([value]) * 300_000 for value in range(4)}
        store.put("replaced", next(iter(bodies)))
        is_done = threading.Event()

        def write() -> None:
            for body in sorted(bodies) * 3:
                store.put("replaced", body)
            is_done.set()

        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(write)
            try:
                while not is_done.is_set() and not writing.done():
                    assert store.get("replaced") in bodies
            finally:
                writing.result()

    def test_threads_do_not_disturb_each_other_when_they_share_a_store(self, store: BlobStore) -> None:
        def work(number: int) -> None:
            body = _bytes(10_000 + number)
            for turn in range(3):
                key = f"thread-{number}/{turn}"
                store.put(key, body)
                assert store.get(key) == body
                assert store.get(key, start=number, length=77) == body[number : number + 77]

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert len(list(store.list())) == 24

    # names and errors

    @pytest.mark.parametrize(
        "key",
        ["", "/a", "a/", "a//b", "a/../b", "..", ".", "a/./b", "a b", "ä", "a\n", "a\\b", "a\0", "~a", "x" * 1000],
    )
    def test_a_name_is_refused_when_it_is_no_key(self, store: BlobStore, key: str) -> None:
        uses: list[Callable[[], object]] = [
            lambda: store.put(key, b""),
            lambda: store.get(key),
            lambda: store.head(key),
            lambda: store.delete([key]),
        ]
        for use in uses:
            with pytest.raises(ConfigError):
                use()

    @pytest.mark.parametrize("prefix", ["../", "/", "a//", "a/../", "a b"])
    def test_a_prefix_is_refused_when_no_key_begins_so(self, store: BlobStore, prefix: str) -> None:
        with pytest.raises(ConfigError):
            list(store.list(prefix))

    def test_unusual_keys_work_when_the_grammar_allows_them(self, store: BlobStore) -> None:
        keys = [
            "...",
            ".hidden",
            "-",
            "_",
            "a.b.c/..d/e..",
            "A/a",
            "a/A",
            "0" * 200,
            "/".join("deep" * 2 for _ in range(20)),
        ]
        for key in keys:
            store.put(key, key.encode())
        assert all(store.get(key) == key.encode() for key in keys)
        assert sorted(info.key for info in store.list()) == sorted(keys)

    def test_errors_survive_pickling_when_sent_to_another_process(self, store: BlobStore) -> None:
        with pytest.raises(NotFoundError) as caught:
            store.get("absent")
        again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
        assert (type(again), str(again), again.context) == (type(caught.value), str(caught.value), caught.value.context)

    def test_close_can_be_repeated_when_the_store_was_used(self, store: BlobStore) -> None:
        store.put("k", _BODY)
        store.close()
        store.close()


class BucketStoreTests(BlobStoreTests):
    """The same for a store whose bucket (or what stands for it) may be missing."""

    @pytest.fixture
    def store_without_bucket(self) -> Iterator[BlobStore]:
        """A store in a bucket that doesn't exist."""
        raise NotImplementedError("give this class a `store_without_bucket` fixture")

    def test_every_operation_names_the_bucket_when_it_is_missing(self, store_without_bucket: BlobStore) -> None:
        store = store_without_bucket
        uses: list[Callable[[], object]] = [
            lambda: store.put("k", _BODY),
            lambda: store.put("k", _BODY, if_absent=True),
            lambda: store.get("k"),
            lambda: store.get("k", start=1, length=2),
            lambda: store.head("k"),
            lambda: list(store.list()),
            lambda: store.delete(["k"]),
        ]
        for use in uses:
            with pytest.raises(NoStoreError) as caught:
                use()
            assert caught.value.context["bucket"]
            assert caught.value.hint

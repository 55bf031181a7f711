"""Segments of private records: read, rolled over, erased line by line, cut where a crash left something behind."""

import errno
import os
from hashlib import sha256
from pathlib import Path

import pytest

from attribution.bodies import ApprovalBody
from attribution.disk import Disk
from attribution.private_records import PrivateRecords, RecordsError, _search, _table, segments
from attribution.trail import Draft, Trail

DIGEST = "sha256:" + "ab" * 32


def name(number: int) -> str:
    return sha256(b"%d" % number).hexdigest()


def half(number: int) -> bytes:
    return b'{"number":%d}' % number


def put(records: PrivateRecords, numbers: range, logged: set[int]) -> None:
    items = [(name(number), half(number)) for number in numbers]
    records.append(numbers.start, items, is_logged=lambda leaf_hash: leaf_hash in {name(n) for n in logged})
    logged |= set(numbers)


def test_groups_are_read_back_by_their_writer_and_by_readers(tmp_path: Path) -> None:
    writer, reader, logged = PrivateRecords(tmp_path, segment_bytes=300), PrivateRecords(tmp_path), set[int]()
    for numbers in (range(0, 1), range(1, 5), range(5, 6), range(6, 20), range(20, 21)):
        put(writer, numbers, logged)
        for records in (writer, reader):
            assert [records.read(number, name(number)) for number in range(numbers.stop)] == [
                half(number) for number in range(numbers.stop)
            ]
    assert [path.name for path in segments(tmp_path)] == [
        "000000000000.records", "000000000005.records", "000000000020.records"
    ]  # fmt: skip
    assert reader.read(3, name(99)) is None
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_an_erased_line_is_gone_from_the_file_and_the_rest_stays(tmp_path: Path) -> None:
    records, logged = PrivateRecords(tmp_path), set[int]()
    put(records, range(0, 10), logged)
    reader = PrivateRecords(tmp_path)
    assert reader.read(4, name(4)) == half(4)
    assert records.erase(4, name(4)) and not records.erase(4, name(4))
    assert half(4) not in segments(tmp_path)[0].read_bytes()
    for which in (records, reader):
        assert [which.read(number, name(number)) is None for number in range(10)] == [n == 4 for n in range(10)]
    put(records, range(10, 12), logged)
    assert reader.read(11, name(11)) == half(11)


def test_a_home_with_single_files_is_read_and_erased_and_goes_on_in_segments(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{name(number)}.json").write_bytes(half(number))
    records = PrivateRecords(tmp_path)
    put(records, range(3, 5), {0, 1, 2})
    assert [records.read(number, name(number)) for number in range(5)] == [half(number) for number in range(5)]
    assert records.erase(1, name(1)) and records.read(1, name(1)) is None
    assert not (tmp_path / f"{name(1)}.json").exists()


@pytest.mark.parametrize(
    "tail", [b"torn", name(7).encode() + b" {}\n", b"\x00" * 600, b"\n\n", b"x" * 700 + b"\nshort\n"]
)
def test_what_a_crash_left_is_cut_by_the_next_append_and_misleads_no_reader(tmp_path: Path, tail: bytes) -> None:
    records, logged = PrivateRecords(tmp_path), set[int]()
    put(records, range(0, 3), logged)
    (path,) = segments(tmp_path)
    with path.open("ab") as file:
        file.write(tail)
    reader = PrivateRecords(tmp_path)
    assert [reader.read(number, name(number)) for number in range(3)] == [half(number) for number in range(3)]
    put(records, range(3, 40), logged)
    assert tail not in path.read_bytes()
    for which in (records, reader, PrivateRecords(tmp_path)):
        assert [which.read(number, name(number)) for number in range(40)] == [half(number) for number in range(40)]


@pytest.mark.parametrize("tail", [b"", b"torn", name(1).encode(), b"\n" + name(2).encode() + b" {}"])
def test_a_segment_that_is_searched_says_what_its_table_says(tmp_path: Path, tail: bytes) -> None:
    put(PrivateRecords(tmp_path), range(0, 3), set())
    (path,) = segments(tmp_path)
    data = path.read_bytes() + tail
    table = _table(data, 0, (0, 0, 0), {})
    for cut in (data, data[: len(data) // 2], b""):
        places = table.places if cut is data else _table(cut, 0, (0, 0, 0), {}).places
        assert [_search(cut, name(number)) for number in range(4)] == [places.get(name(number)) for number in range(4)]


def test_records_of_a_log_that_was_rolled_back_are_not_touched(tmp_path: Path) -> None:
    records, logged = PrivateRecords(tmp_path), set[int]()
    put(records, range(5, 8), logged)
    with pytest.raises(RecordsError, match="restore its newer copy"):
        PrivateRecords(tmp_path).append(2, [(name(2), half(2))], is_logged=lambda _: False)


def test_two_processes_of_one_home_write_one_segment(tmp_path: Path) -> None:
    trail = Trail.open(tmp_path / "home")
    trail.record("approval", ApprovalBody(DIGEST, "approved", "parent"))
    pid = os.fork()
    if not pid:
        status = 1
        try:
            trail.record_many([Draft("approval", ApprovalBody(DIGEST, "approved", f"child {n}")) for n in range(3)])
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    trail.record("approval", ApprovalBody(DIGEST, "approved", "parent again"))
    assert len(segments(tmp_path / "home" / "records")) == 1
    assert [entry.record is not None for entry in Trail.open(tmp_path / "home").entries()] == [True] * 5


def test_the_append_after_a_failed_first_one_makes_the_segments_name_durable(tmp_path: Path) -> None:
    class FullOnce(Disk):
        num_writes = num_directories = 0

        def write(self, descriptor: int, data: bytes, *, offset: int) -> None:
            self.num_writes += 1
            if self.num_writes == 1:
                raise OSError(errno.ENOSPC, "full")
            super().write(descriptor, data, offset=offset)

        def sync_directory(self, path: Path) -> None:
            self.num_directories += 1
            super().sync_directory(path)

    disk, logged = FullOnce(), set[int]()
    records = PrivateRecords(tmp_path, disk=disk)
    with pytest.raises(OSError, match="full"):
        put(records, range(0, 1), logged)
    assert segments(tmp_path) and not disk.num_directories
    put(records, range(0, 1), logged)
    assert disk.num_directories == 1
    put(records, range(1, 2), logged)
    assert disk.num_directories == 1

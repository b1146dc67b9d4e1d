"""The index against tarfile and webdataset, and the faults of shards."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from data.making import text_sample, write_tar

from cmpt.data import shards as shards_module
from cmpt.data.index import BESIDE, build_index, load_index, save_index
from cmpt.data.reader import ShardReader
from cmpt.data.shards import open_shards, short_names
from cmpt.data.tar import LINK, walk_members
from cmpt.data.validate import Cause, DataError
from cmpt.recipe import schema

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def add(
    archive: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = ""
) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(data), kind, target
    archive.addfile(member, io.BytesIO(data))


def awkward_tar(path: Path, archive_format: int) -> Path:
    """Directories, links, long and odd names, empty members, sizes around the block size."""
    with tarfile.open(path, "w", format=archive_format) as archive:
        add(archive, "folder", kind=tarfile.DIRTYPE)
        add(archive, "folder/000.JPG", b"j" * 511)
        add(archive, "folder/000.seg.png", b"p" * 512)
        add(archive, "folder/000.txt", b"t" * 513)
        add(archive, "link.jpg", kind=tarfile.SYMTYPE, target="folder/000.JPG")
        add(archive, "hard.jpg", kind=tarfile.LNKTYPE, target="folder/000.JPG")
        add(archive, "pipe.jpg", kind=tarfile.FIFOTYPE)
        add(archive, "empty.jpg", b"")
        add(archive, "no-extension", b"x")
        add(archive, ".hidden", b"x")
        if archive_format != tarfile.USTAR_FORMAT:
            add(archive, "long/" + "n" * 200 + ".jpg", b"long")
            add(archive, "l" * 150, kind=tarfile.SYMTYPE, target="t" * 180)
            add(archive, "schöne-größe-日本.txt", "é".encode())
        add(archive, "d/" * 45 + "deep.jpg", b"prefix of ustar" * 100)
        add(archive, "last.cls", b"z")
    return path


@pytest.mark.parametrize("archive_format", FORMATS.values(), ids=FORMATS)
def test_walker_agrees_with_tarfile(tmp_path, archive_format) -> None:
    path = awkward_tar(tmp_path / "s.tar", archive_format)
    with tarfile.open(path) as archive:
        kinds = [member for member in archive.getmembers() if member.isfile() or member.issym() or member.islnk()]
        expected = [(m.name, m.offset_data, m.size if m.isfile() else LINK) for m in kinds]
    assert list(walk_members(path, "s.tar")) == expected
    assert any(size == LINK for _, _, size in expected)


def test_walker_reads_pax_sizes_global_headers_and_base_256(tmp_path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "made by a test"}) as archive:
        member = tarfile.TarInfo("000.jpg")
        member.size, member.pax_headers = 7, {"mtime": "1.5", "SCHILY.xattr.user.x": "a=b\nc"}
        archive.addfile(member, io.BytesIO(b"content"))
        add(archive, "001.jpg", b"next")
    raw = bytearray(path.read_bytes())
    header = raw.index(b"001.jpg")
    raw[header + 124 : header + 136] = b"\x80" + (4).to_bytes(11, "big")
    raw[header + 148 : header + 156] = b" " * 8
    raw[header + 148 : header + 156] = b"%06o\0 " % sum(raw[header : header + 512])
    path.write_bytes(raw)
    found = list(walk_members(path, "s.tar"))
    assert [(name, size) for name, _, size in found] == [("000.jpg", 7), ("001.jpg", 4)]
    assert [bytes(raw[offset : offset + size]) for _, offset, size in found] == [b"content", b"next"]


@pytest.mark.parametrize("archive_format", FORMATS.values(), ids=FORMATS)
def test_index_groups_as_webdataset_does(tmp_path, archive_format, settings) -> None:
    path = awkward_tar(tmp_path / "s.tar", archive_format)
    (shard,) = open_shards([str(path)], settings)
    reader = ShardReader(2)
    ours = []
    for place in range(shard.count):
        members = reader.members(shard, place)
        whole = {name: extent for name, extent in members.extents.items() if extent[1] != LINK}
        if whole:  # webdataset does not see links; here they have a cause of their own
            ours.append((members.key, {name: reader.read(shard, extent) for name, extent in whole.items()}))
    dataset = webdataset.WebDataset(str(path), shardshuffle=False)
    theirs = [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in dataset]
    assert ours == theirs


def test_an_extension_that_repeats_begins_a_new_sample(tmp_path) -> None:
    path = write_tar(tmp_path / "s.tar", [("a", {"jpg": b"1", "txt": b"2"}), ("a", {"jpg": b"3", "txt": b"4"})])
    index = build_index(path, "s.tar")
    assert [list(index.sample(place).extents) for place in range(len(index))] == [["jpg", "txt"], ["jpg", "txt"]]


def test_a_shard_cut_anywhere_is_an_error_that_names_it(tmp_path) -> None:
    whole = write_tar(tmp_path / "whole.tar", [text_sample(number) for number in range(3)]).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        last = archive.getmembers()[-1]
        end = last.offset_data + -(-last.size // 512) * 512
    cut = tmp_path / "cut.tar"
    for length in [*range(1, end, 97), *range(512, end + 1, 512), end + 511]:
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.tar: (cut short|is not)"):
            list(walk_members(cut, str(cut)))
    cut.write_bytes(whole[: end + 512])
    assert len(list(walk_members(cut, "x"))) == 6


def test_a_damaged_header_is_an_error_and_not_the_end(tmp_path) -> None:
    path = write_tar(tmp_path / "s.tar", [text_sample(number) for number in range(3)])
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"000001.txt")] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"s\.tar: damaged tar header at byte \d+"):
        list(walk_members(path, str(path)))
    index = build_index(path, str(path))
    assert (len(index), index.fault.cause) == (2, Cause.DAMAGED_SHARD)  # the second one lacks its text


@pytest.mark.parametrize("again", [False, True])
def test_what_comes_before_the_damage_is_used(tmp_path, settings, again) -> None:
    raw = write_tar(tmp_path / "whole.tar", [text_sample(number) for number in range(9)]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(raw[: raw.index(b"000005.txt") + 400])
    (tmp_path / "empty.tar").write_bytes(b"")
    for _ in range(1 + again):  # the second time from the cached indexes
        shards = open_shards([str(tmp_path / "{whole,cut,empty}.tar")], settings)
    assert [shard.count for shard in shards] == [9, 6, 0]
    assert [shard.fault and shard.fault.cause for shard in shards] == [None, Cause.TRUNCATED_SHARD, Cause.EMPTY_SHARD]


def test_files_that_are_no_shards_are_all_named(tmp_path, settings) -> None:
    settings.broken_shards = "stop"
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "zipped.tar").write_bytes(gzip.compress(b"x" * 2000))
    (tmp_path / "zeros.tar").write_bytes(bytes(10240))
    (tmp_path / "page.tar").write_bytes(b"<html>not found</html>" * 100)
    write_tar(tmp_path / "good.tar", [text_sample(1)])
    with pytest.raises(DataError) as caught:
        open_shards([str(tmp_path / "{good,empty,zipped,zeros,page}.tar")], settings)
    message = str(caught.value)
    assert message.startswith("data.train: 4 of 5 shards cannot be used")
    for part in (
        "empty.tar: is an empty file",
        "zipped.tar: is not an uncompressed tar",
        "zeros.tar: holds no samples",
        "page.tar: is not an uncompressed tar",
    ):
        assert part in message


def test_missing_and_repeated_shards_are_refused(tmp_path, settings) -> None:
    write_tar(tmp_path / "s.tar", [text_sample(1)])
    with pytest.raises(ValueError, match=r"2 of 3 shards do not exist: .*/t\.tar; .*/u\.tar"):
        open_shards([str(tmp_path / "{s,t,u}.tar")], settings)
    with pytest.raises(ValueError, match=r"listed twice in one source .*s\.tar"):
        open_shards([str(tmp_path / "s.tar"), str(tmp_path / "{s}.tar"), str(tmp_path / "{s,s}.tar")], settings)
    with pytest.raises(ValueError, match=r"data\.train\.3: .*/no-\*\.tar matches no file"):
        open_shards([str(tmp_path / "no-*.tar")], settings, "data.train.3")
    for name in ("empty", "zeros"):
        (tmp_path / f"{name}.tar").write_bytes(b"" if name == "empty" else bytes(10240))
    with pytest.raises(ValueError, match=r"2 of 2 shards cannot be used: .*is an empty file.*holds no samples"):
        open_shards([str(tmp_path / "{empty,zeros}.tar")], settings)


def test_wildcards_name_shards_in_order(tmp_path, settings) -> None:
    for name in ("b-1", "a-2", "a-10"):
        write_tar(tmp_path / f"{name}.tar", [text_sample(1)])
    assert [shard.name for shard in open_shards([str(tmp_path / "*.tar")], settings)] == [
        "a-10.tar",
        "a-2.tar",
        "b-1.tar",
    ]


def test_names_are_as_long_as_tells_the_shards_apart() -> None:
    assert short_names(["/x/a/0.tar", "/x/a/1.tar"]) == ["0.tar", "1.tar"]
    assert short_names(["/x/a/0.tar", "/x/b/0.tar"]) == ["a/0.tar", "b/0.tar"]
    assert short_names(["s3://x/0.tar", "/x/0.tar", "0.tar"]) == ["s3://x/0.tar", "/x/0.tar", "0.tar"]


@pytest.mark.parametrize("size", ["-1536", "x", "1" * 30])
def test_hostile_sizes_end_the_walk(tmp_path, size) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "000.jpg", b"first")
        member = tarfile.TarInfo("001.jpg")
        member.pax_headers = {"size": size}
        archive.addfile(member)
    index = build_index(path, "s.tar")
    assert len(index) == 1 and index.fault.cause in (Cause.DAMAGED_SHARD, Cause.TRUNCATED_SHARD)


def test_metadata_is_bounded(tmp_path) -> None:
    for size, fault in ((500_000, None), (2_000_000, Cause.DAMAGED_SHARD)):
        path = tmp_path / f"{size}.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            member = tarfile.TarInfo("000.jpg")
            member.pax_headers = {"comment": "x" * size, "more": "y"}
            archive.addfile(member)
        index = build_index(path, "s.tar")
        assert (index.fault and index.fault.cause) == fault


def test_an_index_survives_its_file_with_names_of_all_kinds(tmp_path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("a.x\0jpg", "a.\n", "b.jpg", "b.txt", "é.日本", "c."):
            member = tarfile.TarInfo("placeholder")
            member.pax_headers = {"path": name}
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name[:1].encode() * len(name)))
    built = build_index(path, "s.tar")
    save_index(built, tmp_path / "index.npz")
    loaded = load_index(tmp_path / "index.npz")
    assert [loaded.sample(n) for n in range(len(loaded))] == [built.sample(n) for n in range(len(built))]
    assert (loaded.fault, loaded.digest, loaded.shard_bytes) == (None, None, path.stat().st_size)
    empty = build_index(write_tar(tmp_path / "empty.tar", []), "empty.tar")
    save_index(empty, tmp_path / "index.npz")
    assert load_index(tmp_path / "index.npz").fault == empty.fault


def test_a_repeated_key_is_marked(tmp_path) -> None:
    pair = {"jpg": b"1", "txt": b"2"}
    index = build_index(write_tar(tmp_path / "s.tar", [("a", pair), ("b", pair), ("a", pair), ("a", pair)]), "s.tar")
    assert [index.sample(place).repeated for place in range(4)] == [False, False, True, True]


def test_an_index_beside_the_shard_is_used_while_it_is_of_this_shard(tmp_path, settings, monkeypatch) -> None:
    path = write_tar(tmp_path / "s.tar", [text_sample(number) for number in range(3)])
    save_index(build_index(path, "s.tar"), Path(f"{path}{BESIDE}"))
    with monkeypatch.context() as patch:
        patch.delattr(shards_module, "build_index")
        assert open_shards([str(path)], settings)[0].count == 3
    write_tar(path, [text_sample(number) for number in range(4)])
    os.utime(path, (2e9, 2e9))
    assert open_shards([str(path)], settings)[0].count == 4


def test_shards_come_in_the_order_of_the_urls(tmp_path, settings) -> None:
    for number in range(12):
        write_tar(tmp_path / f"{number:02d}.tar", [text_sample(n) for n in range(number + 1)])
    shards = open_shards([str(tmp_path / "{06..11}.tar"), str(tmp_path / "{00..05}.tar")], settings)
    assert [shard.count for shard in shards] == [7, 8, 9, 10, 11, 12, 1, 2, 3, 4, 5, 6]


def test_index_is_cached_until_the_shard_changes(tmp_path, settings, monkeypatch) -> None:
    path = write_tar(tmp_path / "s.tar", [text_sample(number) for number in range(3)])
    built = []
    original = shards_module.build_index
    monkeypatch.setattr(shards_module, "build_index", lambda *args: built.append(1) or original(*args))
    assert open_shards([str(path)], settings)[0].count == 3
    assert open_shards([str(path)], settings)[0].count == 3
    assert len(built) == 1
    write_tar(path, [text_sample(number) for number in range(4)])
    assert open_shards([str(path)], settings)[0].count == 4
    os.utime(path, (1, 1))
    open_shards([str(path)], settings)
    assert len(built) == 3


@pytest.mark.parametrize("left_behind", [b"", b"PK\x03\x04 half an index", None])
def test_a_broken_cached_index_is_made_again(tmp_path, settings, left_behind) -> None:
    path = write_tar(tmp_path / "s.tar", [text_sample(number) for number in range(3)])
    (shard,) = open_shards([str(path)], settings)
    shard.index_path.write_bytes(shard.index_path.read_bytes()[:200] if left_behind is None else left_behind)
    (again,) = open_shards([str(path)], settings)
    assert again == shard
    assert ShardReader(1).members(again, 2).key == "000002"
    assert not list(Path(settings.cache_folder).rglob("*.tmp"))


def test_no_more_shards_are_open_than_allowed(tmp_path, settings) -> None:
    for number in range(10):
        write_tar(tmp_path / f"{number}.tar", [text_sample(number)])
    shards = open_shards([str(tmp_path / "{0..9}.tar")], settings)
    reader = ShardReader(3)
    before = len(os.listdir("/proc/self/fd"))
    for shard in [*shards, *shards]:
        assert reader.read(shard, reader.members(shard, 0).extents["txt"]).startswith(b"picture")
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    del reader
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_shard_that_changes_in_use_is_an_error(tmp_path, settings) -> None:
    path = write_tar(tmp_path / "s.tar", [text_sample(number) for number in range(3)])
    (shard,) = open_shards([str(path)], settings)
    reader = ShardReader(1)
    extent = reader.members(shard, 2).extents["txt"]
    os.truncate(path, extent[0] + 3)
    with pytest.raises(DataError, match=r"s\.tar: changed while in use, got 3 of \d+ bytes"):
        reader.read(shard, extent)


def test_an_unusable_cache_folder_names_the_field(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    path = write_tar(tmp_path / "s.tar", [text_sample(1)])
    with pytest.raises(ValueError, match="data.cache_folder cannot be made"):
        open_shards([str(path)], schema.Data(cache_folder=str(tmp_path / "file")))


def test_index_takes_little_memory(tmp_path) -> None:
    path = tmp_path / "s.tar"
    write_tar(path, [(f"{n:09d}", {"jpg": b"", "txt": b"", "json": b""}) for n in range(1000)])
    index = build_index(path, "s.tar")
    total = sum(value.nbytes for value in vars(index).values() if isinstance(value, np.ndarray))
    assert total <= 100 * len(index)

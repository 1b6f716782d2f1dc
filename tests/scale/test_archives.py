"""archives.py: links in tars, and zips; test_tar_stream.py has what is common to all tars."""

import io
import stat
import tarfile
import unicodedata
import zipfile

import pytest
from level_captioner import grey, picture
from shard_runs import pictures, results, run, write_tar

from captioning.files import sha256_of
from captioning.scale import archives
from captioning.scale.archives import Findings, TarShard, ZipShard


def write_linked(path, mode="w"):
    """Two pictures, and links of each kind to them, to each other and to nowhere."""
    with tarfile.open(path, mode) as archive:

        def add(name, content=None, kind=tarfile.REGTYPE, target=""):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.size = kind, target, len(content or b"")
            archive.addfile(entry, io.BytesIO(content or b""))

        add("in/early.png", kind=tarfile.SYMTYPE, target="../late.png")
        add("./in/a.png", picture(1))
        add("hard.png", kind=tarfile.LNKTYPE, target="./in/a.png")
        add("in/soft.png", kind=tarfile.SYMTYPE, target="a.png")
        add("twice.jpg", kind=tarfile.LNKTYPE, target="hard.png")
        add("of-other-name.png", kind=tarfile.LNKTYPE, target="blob")
        add("blob", picture(3))
        add("note.txt", kind=tarfile.LNKTYPE, target="in/a.png")
        add("outside.png", kind=tarfile.SYMTYPE, target="/data/x.png")
        add("loop.png", kind=tarfile.SYMTYPE, target="loop.png")
        add("device.png", kind=tarfile.FIFOTYPE)
        add("late.png", picture(2))
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_links_in_a_tar_are_files(tmp_path, mode):
    """Hard links were refused; GNU tar writes one for each further name of a file."""
    path, found = write_linked(tmp_path / "t.tar", mode), Findings()
    entries = {entry.key: entry for entry in TarShard(path, "t").entries(found)}
    good = {key: grey(entry.load()) for key, entry in entries.items() if not isinstance(entry.source, ValueError)}
    expected = {"in/a": 1, "late": 2, "hard": 1, "in/soft": 1, "twice": 1, "of-other-name": 3, "in/early": 2}
    assert good == expected
    bad = {key: str(entry.source) for key, entry in entries.items() if key not in good}
    assert bad.keys() == {"outside", "loop", "device"}
    assert "t.tar: outside.png: is a link to data/x.png, which is not in there; take it out" in bad["outside"]
    assert "is no plain file" in bad["device"]
    assert (found.others, found.damage, found.sha256) == (2, "", sha256_of(path))


def test_hard_links_as_tar_itself_writes_them(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture(5))
    (folder / "b.png").hardlink_to(folder / "a.png")
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.add(folder, "images")
        assert any(member.islnk() for member in archive)
    assert run(tmp_path / "t.tar", tmp_path / "out.jsonl") == 0
    assert results(tmp_path / "out.jsonl") == {"images/a": "level 5", "images/b": "level 5"}


def test_a_tar_is_read_a_second_time_only_for_links(tmp_path, monkeypatch):
    monkeypatch.setattr(TarShard, "_second_pass", lambda *_: pytest.fail("read twice"))
    path = write_tar(tmp_path / "t.tar", pictures(0, 3))
    assert len(list(TarShard(path, "t").entries(Findings()))) == 3


def test_links_into_what_is_cut_off_are_named(tmp_path):
    whole = write_linked(tmp_path / "t.tar").read_bytes()
    for length in range(0, len(whole), 511):
        (tmp_path / "t.tar").write_bytes(whole[:length])
        for entry in TarShard(tmp_path / "t.tar", "t").entries(Findings()):
            assert isinstance(entry.source, bytes) or "t.tar: " in str(entry.source)


# ---------------------------------------------------------------------------------------------------------------- zips


def write_zip(path, files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_gives_its_images_and_says_what_else_it_holds(tmp_path, method):
    split = unicodedata.normalize("NFD", "é")
    files = [("in/a.b.PNG", picture(1)), ("a.txt", b"1"), ("__MACOSX/._a.png", b""), (f"{split}.png", picture(2))]
    path, found = write_zip(tmp_path / "t.zip", [*files, ("folder/", b""), ("bad.jpg", b"x")], method), Findings()
    entries = list(ZipShard(path, "t").entries(found))
    assert [entry.key for entry in entries] == ["in/a.b", "é", "bad"]
    assert [grey(entry.load()) for entry in entries[:2]] == [1, 2]
    with pytest.raises(ValueError, match=r"t\.zip: bad\.jpg: the file is of no known"):
        entries[2].load()
    assert (found.others, found.damage, found.sha256) == (2, "", sha256_of(path))
    assert [entry.key for entry in ZipShard(path, "t", "*.txt").entries(Findings())] == ["a"]


def test_zips_and_tars_are_captioned_together(tmp_path):
    write_zip(tmp_path / "0.zip", pictures(0, 3))
    write_tar(tmp_path / "1.tar", pictures(3, 5))
    assert run(tmp_path / "{0.zip,1.tar}", tmp_path / "out.jsonl") == 0
    assert results(tmp_path / "out.jsonl") == {f"{k:03d}": f"level {k}" for k in range(5)}


def test_one_bad_entry_of_a_zip_spares_the_others(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "t.zip", pictures(0, 3), zipfile.ZIP_STORED)
    whole = path.read_bytes()
    damaged = whole.replace(picture(1), picture(1)[:-20] + bytes(20))
    encrypted = bytearray(whole)
    for place in (whole.index(b"PK\3\4") + 6, whole.index(b"PK\1\2") + 8):
        encrypted[place] |= 1
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    for content, key, message in ((damaged, "001", "cannot be unpacked"), (bytes(encrypted), "000", "password")):
        path.write_bytes(content)
        entries = {entry.key: entry for entry in ZipShard(path, "t").entries(Findings())}
        assert len(entries) == 3
        assert [k for k, entry in entries.items() if isinstance(entry.source, ValueError)] == [key]
        assert message in str(entries[key].source)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(link, "elsewhere")
    (entry,) = ZipShard(path, "t").entries(Findings())
    assert "is a link" in str(entry.source)
    monkeypatch.setattr(archives, "MAX_IMAGE_BYTES", 10)
    write_zip(path, pictures(0, 1))
    (entry,) = ZipShard(path, "t").entries(Findings())
    assert "larger than" in str(entry.source)


def test_a_damaged_zip_is_named(tmp_path):
    path = write_zip(tmp_path / "t.zip", pictures(0, 3))
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        found = Findings()
        assert list(ZipShard(path, "t").entries(found)) == []
        assert found.damage, length

"""sources.py: what a command line names, and the shards and entries that it becomes."""

from pathlib import Path

import pytest
from level_captioner import grey, picture
from shard_runs import pictures, write_tar

from captioning.data.images import list_images
from captioning.scale import sources
from captioning.scale.sources import Findings, Source, expand_braces, find_tars


def test_braces():
    assert list(expand_braces("a/{08..11}-{x,y}.tar")) == [
        f"a/{n}-{c}.tar" for n in ("08", "09", "10", "11") for c in "xy"
    ]
    assert list(expand_braces("{8..10}")) == ["8", "9", "10"]
    assert list(expand_braces("plain.tar")) == ["plain.tar"]
    assert list(expand_braces("{x}.tar")) == ["{x}.tar"]
    for text, message in (
        ("{3..1}", "backwards"),
        ("{a..c}", "two numbers"),
        ("{0..999999999}", "a digit too many"),
        ("{0..9999}{0..9999}", "a digit too many"),
    ):
        with pytest.raises(ValueError, match=message):
            list(expand_braces(text))


def test_what_a_command_line_names_must_be_there(tars):
    assert [path.name for path in find_tars(str(tars))] == ["0.tar", "1.tar", "2.tar"]
    assert [path.name for path in find_tars(str(tars.parent / "*.tar"))] == ["0.tar", "1.tar", "2.tar"]
    with pytest.raises(FileNotFoundError, match=r"3\.tar"):
        list(find_tars(str(tars.parent / "{0..3}.tar")))
    with pytest.raises(FileNotFoundError, match=r"\*\.tgz"):
        list(find_tars(str(tars.parent / "*.tgz")))
    with pytest.raises(ValueError, match="only local files"):
        list(find_tars("https://example.org/{0..3}.tar"))
    with pytest.raises(ValueError, match="named twice"):
        Source(tars.parent / "{0,1,0}.tar").shards(tars.parent)


def test_shards_of_one_name_in_two_folders_get_two_names(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar.gz", pictures(0, 1), "w:gz")
    names = [shard.name for shard in Source(tmp_path / "{a,b}" / "0.tar.gz").shards(tmp_path)]
    assert len(set(names)) == 2
    assert all(name.startswith("0-") for name in names)


def test_a_list_is_cut_into_shards_of_lines(tmp_path):
    for level in range(5):
        (tmp_path / f"{level}.png").write_bytes(picture(level))
    file = tmp_path / "list.txt"
    file.write_text("0.png\n1.png\n\n./2.png\n" + str(tmp_path / "3.png") + "\r\n4.png")
    found = Source(file, shard_size=2).shards(tmp_path)
    entries = [list(shard.entries(Findings())) for shard in found]
    assert [[entry.key for entry in some] for some in entries] == [["0", "1"], ["2"], ["3", "4"]]
    assert [grey(entry.load()) for some in entries for entry in some] == [0, 1, 2, 3, 4]
    assert len({shard.name for shard in found}) == 3
    rooted = Source(file, root=tmp_path / "elsewhere").shards(tmp_path)[0]
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        next(iter(rooted.entries(Findings()))).load()


def test_a_jsonl_list_names_keys_and_its_bad_lines_are_named(tmp_path):
    (tmp_path / "p.png").write_bytes(picture(9))
    lines = [
        '{"image": "p.png", "key": "own"}',
        '{"image": "p.png"}',
        "{",
        '{"key": "x"}',
        '{"image": ""}',
        '{"image": "a\\u0000b"}',
        '{"image": "\\ud800.png"}',
        '{"image": "p.png", "key": 3}',
        "[]",
    ]
    (tmp_path / "l.jsonl").write_text("\n".join(lines))
    entries = list(Source(tmp_path / "l.jsonl").shards(tmp_path)[0].entries(Findings()))
    assert [entry.key for entry in entries[:2]] == ["own", "p"]
    assert grey(entries[0].load()) == 9
    assert len(entries) == len(lines)
    for number, entry in enumerate(entries[2:], start=3):
        with pytest.raises(ValueError, match=rf"l\.jsonl line {number}: "):
            entry.load()


def test_a_folder_is_listed_in_the_order_of_its_names(tmp_path, monkeypatch):
    """In sorted runs on disk, since a million names must not be in memory."""
    monkeypatch.setattr(sources, "SORTED_AT_ONCE", 3)
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("b.png", "a.JPG", "é.png", "Z.webp", "10.png", "9.png", ".hidden.png", "note.txt", "line\nend.png"):
        (folder / name).write_bytes(b"")
    (folder / "folder.png").mkdir()
    sources.list_folder(folder, tmp_path / "spool.jsonl")
    found = Source(tmp_path / "spool.jsonl", root=folder).shards(tmp_path)[0]
    assert [entry.source for entry in found.entries(Findings())] == list_images(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "spool.jsonl"]


@pytest.mark.parametrize(
    ("argument", "flags", "message"),
    [
        ("x.tar", {"root": Path("r")}, "--list-root"),
        ("x.txt", {"pattern": "*.jpg"}, "--entries"),
        ("x.tar", {"shard_size": 0}, "--shard-size 0"),
    ],
)
def test_flags_that_do_not_belong_are_refused(argument, flags, message):
    with pytest.raises(ValueError, match=message):
        Source(Path(argument), **flags)

"""sources.py: what a command line names, and the shards and entries that it becomes."""

import unicodedata
from pathlib import Path

import pytest
from level_captioner import grey, picture
from PIL import Image
from shard_runs import pictures, write_tar

from captioning.data.listing import list_images
from captioning.scale import sources
from captioning.scale.archives import Findings
from captioning.scale.sources import Source, expand_braces, find_files, images_at


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
    assert [path.name for path in find_files(str(tars))] == ["0.tar", "1.tar", "2.tar"]
    assert [path.name for path in find_files(str(tars.parent / "*.tar"))] == ["0.tar", "1.tar", "2.tar"]
    with pytest.raises(FileNotFoundError, match=r"3\.tar"):
        list(find_files(str(tars.parent / "{0..3}.tar")))
    with pytest.raises(FileNotFoundError, match=r"\*\.tgz"):
        list(find_files(str(tars.parent / "*.tgz")))
    with pytest.raises(ValueError, match="only local files"):
        list(find_files("https://example.org/{0..3}.tar"))
    with pytest.raises(ValueError, match="named twice"):
        Source((tars.parent / "{0,1,0}.tar",)).shards(tars.parent)


def test_shards_of_one_name_in_two_folders_get_two_names(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar.gz", pictures(0, 1), "w:gz")
    names = [shard.name for shard in Source((tmp_path / "{a,b}" / "0.tar.gz",)).shards(tmp_path)]
    assert len(set(names)) == 2
    assert all(name.startswith("0-") for name in names)


def test_a_list_is_cut_into_shards_of_lines(tmp_path):
    for level in range(5):
        (tmp_path / f"{level}.png").write_bytes(picture(level))
    file = tmp_path / "list.txt"
    file.write_text("0.png\n1.png\n\n./2.png\n" + str(tmp_path / "3.png") + "\r\n4.png")
    found = Source((file,), shard_size=2).shards(tmp_path)
    entries = [list(shard.entries(Findings())) for shard in found]
    assert [[entry.key for entry in some] for some in entries] == [["0", "1"], ["2"], ["3", "4"]]
    assert [grey(entry.load()) for some in entries for entry in some] == [0, 1, 2, 3, 4]
    assert len({shard.name for shard in found}) == 3
    rooted = Source((file,), root=tmp_path / "elsewhere").shards(tmp_path)[0]
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        next(iter(rooted.entries(Findings()))).load()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_list_with_a_byte_order_mark_loses_no_image(tmp_path, encoding, ending):
    """The first path had the mark in front, and in UTF-16 none was found; Ċ and ਊ hold the byte of a line's end."""
    names = ["Ċ.png", "a.png", "b ਊ.png", "\U0001f600.png", "c.png", "ĊĊ.png"]
    for level, name in enumerate(names):
        (tmp_path / name).write_bytes(picture(level))
    mark = b"" if encoding == "utf-8-sig" else "\ufeff".encode(encoding)
    for suffix, lines in ((".txt", names), (".jsonl", [f'{{"image": "{name}"}}' for name in names])):
        for last in (ending, ""):
            file = tmp_path / f"list{suffix}"
            file.write_bytes(mark + (ending.join(lines) + last).encode(encoding))
            shards = Source((file,), shard_size=4).shards(tmp_path)
            entries = [entry for shard in shards for entry in shard.entries(Findings())]
            assert [entry.key for entry in entries] == [name[:-4] for name in names]
            assert [grey(entry.load()) for entry in entries] == list(range(6))
            assert [shard.line for shard in shards] == [1, 5]


def test_blank_lines_and_bad_text_in_a_marked_list(tmp_path):
    file = tmp_path / "list.txt"
    file.write_bytes("\ufeffa.png\n\n  \nb.png\n".encode("utf-16-le") + b"\x00\xdc\n\x00" + b"odd")
    (shard,) = Source((file,)).shards(tmp_path)
    first, second, broken, cut = shard.entries(Findings())
    assert (first.key, second.key) == ("a", "b")
    assert "list.txt line 5: " in str(broken.source) and "list.txt line 6: " in str(cut.source)


def test_a_list_finds_files_in_the_other_form_of_unicode(tmp_path):
    composed, split = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    (tmp_path / split).mkdir()
    (tmp_path / split / f"{split}.png").write_bytes(picture(7))
    lines = [f"{composed}/{composed}.png", f"{split}/{split}.png", f"{split}/gone {split}.png"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    *found, gone = Source((tmp_path / "list.txt",)).shards(tmp_path)[0].entries(Findings())
    assert [(entry.key, grey(entry.load())) for entry in found] == [(composed, 7)] * 2
    assert gone.key == f"gone {composed}"
    with pytest.raises(FileNotFoundError):
        gone.load()


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
    entries = list(Source((tmp_path / "l.jsonl",)).shards(tmp_path)[0].entries(Findings()))
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
    found = Source((tmp_path / "spool.jsonl",), root=folder).shards(tmp_path)[0]
    assert [entry.source for entry in found.entries(Findings())] == list_images(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "spool.jsonl"]


def test_what_a_command_line_names(tmp_path):
    """A single picture was "no such folder of images"."""
    for name in ("a.jpg", "b.PNG", "sub/c.webp", "notes.doc", "l.txt", "0.tar", "1.zip", "a[1].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))

    def kind(*names):
        return Source(tuple(tmp_path / name for name in names)).kind

    assert kind("") == kind("sub") == kind("gone") == "folder"
    assert kind("a.jpg") == kind("a.jpg", "b.PNG") == kind("*.jpg") == kind("{a,b}.jpg") == "pictures"
    assert kind("a[1].png") == kind("sub/*") == kind("**/*.webp") == kind("gone.jpg") == "pictures"
    assert kind("0.tar") == kind("0.tar", "1.zip") == kind("*.zip") == kind("{0..9}.tar.gz") == "archives"
    assert kind("x.TGZ") == kind("gone/*") == "archives"
    assert kind("l.txt") == kind("gone.jsonl") == "list"
    for names in (("a.jpg", "0.tar"), ("sub", "a.jpg"), ("l.txt", "l.txt"), ("sub", "gone")):
        with pytest.raises(ValueError, match="must be pictures, or tars and zips; give a folder"):
            kind(*names)
    with pytest.raises(ValueError, match=r"notes\.doc: none of what images can come from; give a folder, pictures"):
        kind("notes.doc")


def test_pictures_are_entries_in_the_order_given_and_shards_too(tmp_path):
    for level, name in enumerate(("b.png", "a.png", "sub/c.png", "sub/a.jpg")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(level))
    source = Source((tmp_path / "b.png", tmp_path / "*.png", tmp_path / "sub" / "c.png"), shard_size=2)
    with pytest.raises(ValueError, match=r"b\.png and b\.png share the name 'b'"):
        source.check()
    source = Source((tmp_path / "b.png", tmp_path / "sub" / "*.png", tmp_path / "a.png"), shard_size=2)
    source.check()
    assert [(entry.key, grey(entry.load())) for entry in source.images()] == [("b", 0), ("c", 2), ("a", 1)]
    source.spool(tmp_path)
    spooled = [entry for shard in source.shards(tmp_path) for entry in shard.entries(Findings())]
    assert [(entry.key, grey(entry.load())) for entry in spooled] == [("b", 0), ("c", 2), ("a", 1)]
    with pytest.raises(ValueError, match=r"a\.png and a\.jpg share the name 'a'"):
        Source((tmp_path / "a.png", tmp_path / "sub" / "a.jpg")).images()
    with pytest.raises(FileNotFoundError, match=r"gone\.png: no such file; give a folder"):
        Source((tmp_path / "gone.png",)).check()


def test_subfolders_of_a_folder_become_a_list_with_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SORTED_AT_ONCE", 2)
    for level, name in enumerate(("b.png", "a/x.png", "a/b/x.png", "c/notes.txt")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(picture(level))
    source = Source((tmp_path / "in",), recursive=True)
    source.spool(tmp_path)
    (shard,) = source.shards(tmp_path)
    listed = [(entry.key, entry.source) for entry in shard.entries(Findings())]
    assert listed == [(entry.key, entry.source) for entry in source.images()]
    assert [key for key, _ in listed] == ["a/b/x", "a/x", "b"]


@pytest.mark.parametrize(
    ("argument", "flags", "message"),
    [
        ("x.tar", {"root": Path("r")}, "--list-root"),
        ("x.txt", {"pattern": "*.jpg"}, "--entries"),
        ("x.tar", {"shard_size": 0}, "--shard-size 0"),
        ("x.tar", {"recursive": True}, "--recursive: belongs to a folder"),
    ],
)
def test_flags_that_do_not_belong_are_refused(argument, flags, message):
    with pytest.raises(ValueError, match=message):
        Source((Path(argument),), **flags)


def test_pictures_of_one_name_are_refused_in_a_folder_and_chosen_by_a_glob(tmp_path):
    """a.jpg beside a.tif: which one the captions of `a` are of would be a guess. Of a list's the first counts."""
    for name in ("a.jpg", "a.tif", "b.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"a\.jpg and a\.tif share the name 'a'.*choose by a glob such as '\*\.jpg'"):
        Source((tmp_path,)).images()
    with pytest.raises(ValueError, match="share the name 'a'"):
        images_at([tmp_path])
    assert [entry.key for entry in Source((tmp_path / "*.jpg",)).images()] == ["a", "b"]
    assert images_at([tmp_path / "*.jpg"]) == {"a": tmp_path / "a.jpg", "b": tmp_path / "b.jpg"}


def test_only_files_of_their_own_are_explained(tmp_path):
    """p3_attention.py took a zip for a picture, after it had built the model."""
    for name in ("a.zip", "a.tar.gz", "list.jsonl"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"{name}: not a picture; give folders, pictures or globs, of an archive"):
            images_at([tmp_path / name])
    for name in ("nowhere", "*.png", "{0..1}.png"):
        with pytest.raises(FileNotFoundError, match=r"no such file; give folders, pictures or globs$"):
            images_at([tmp_path / name])
    for number in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    assert [*images_at([tmp_path / "{0..1}.png"])] == ["0", "1"]

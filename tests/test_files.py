"""Files are read strictly (what Python accepts silently is an error) and written completely or not at all."""

import base64
import io
import json
import os
import stat
import threading

import pytest
from PIL import Image

from captioning import files
from captioning.files import (
    HeldError,
    atomic_path,
    data_url,
    lock,
    markdown_table,
    parse_json,
    read_json,
    sha256_of,
    waiting_lock,
    write_csv,
    write_json,
    write_text,
)


def write(tmp_path, content):
    file = tmp_path / "file.json"
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_utf8_and_whatever_a_byte_order_mark_says_is_read(tmp_path, encoding):
    """PowerShell's > writes UTF-16, Notepad a mark in front of UTF-8."""
    assert read_json(write(tmp_path, '{"é": [1, "日本"]}'.encode(encoding))) == {"é": [1, "日本"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a JSON file"),
        (b'{"a": 1', "was the download cut off"),
        ('{"é": 1}'.encode("latin-1"), "not a JSON file"),
        ('{"é": 1}'.encode("utf-16-le"), "not a JSON file"),  # no mark
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "'b' occurs twice"),
        (b"[NaN]", "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"[1e999]", "beyond floating point"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "not a JSON file"),
    ],
)
def test_odd_files_are_refused_by_name(tmp_path, content, message):
    file = write(tmp_path, content)
    with pytest.raises(ValueError, match=message) as error:
        read_json(file)
    assert str(error.value).startswith(str(file))
    assert len(str(error.value)) < len(str(file)) + 300


WHOLE = {"a": [1, -2.5e-3, True, False, None, 'x\\y"\n\x01 é 😀'], "b": {"c": {}, "d": []}, "ü": 1e5, "k": -0.5}


@pytest.mark.parametrize("ascii_only", [True, False])
def test_only_a_file_that_ends_early_is_said_to_be_cut_off(tmp_path, ascii_only):
    whole = json.dumps(WHOLE, ensure_ascii=ascii_only, indent=1).encode()
    for size in range(len(whole)):
        with pytest.raises(ValueError, match=r"; was the download cut off\?$"):
            read_json(write(tmp_path, whole[:size]))


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1,}',
        b'{"a" 1}',
        b"{a: 1}",
        b"[1 2]",
        b"{'a': 1}",
        b'{"a": "x\ny"}',
        b'{"a": "\\q"}',
        b"[1]\n[2]",
        b"{}-",
        b'{"a": nul, "b": 1}',
        b'{"a": 1}}',
        b'{"a": 1, "a": 2}',
        b'{"a": "\xff"}',
        b"a dog runs",
    ],
)
def test_any_other_fault_is_no_sign_of_that(tmp_path, content):
    with pytest.raises(ValueError, match="not a JSON file") as error:
        read_json(write(tmp_path, content))
    assert "cut off" not in str(error.value)


def test_missing_and_too_large_files_are_named_before_reading(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"file\.json: no such file"):
        read_json(tmp_path / "file.json")
    monkeypatch.setattr(files, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="split the file"):
        read_json(write(tmp_path, b"[1, 2, 3, 4]"))


def test_plain_values_come_as_python_has_them():
    assert parse_json('{"a": [1, -2.5e3, true, null, "x"]}') == {"a": [1, -2500.0, True, None, "x"]}


def test_a_picture_in_a_page_is_small_and_in_the_shorter_format():
    plain = Image.new("RGBA", (600, 40), "red")
    noise = Image.effect_noise((600, 40), 100)
    for picture, formats, name in [
        (plain, ("jpeg",), "jpeg"),
        (plain, ("png", "jpeg"), "png"),
        (noise, ("png", "jpeg"), "jpeg"),
    ]:
        kind, _, content = data_url(picture, 300, formats).partition(";base64,")
        assert kind == f"data:image/{name}"
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            assert (image.format.lower(), image.size) == (name, (300, 20))
    assert plain.size == (600, 40), "the caller's picture stays"


def test_a_csv_file_keeps_every_digit_and_leaves_out_what_is_unknown(tmp_path):
    write_csv(tmp_path / "out.csv", ["name", "score"], [("a, b", 0.1 + 0.2), ("é", None)])
    expected = 'name,score\n"a, b",0.30000000000000004\né,\n'
    assert (tmp_path / "out.csv").read_bytes() == expected.encode()


def test_a_markdown_table_escapes_what_would_end_a_cell():
    assert markdown_table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n|---|---|\n| x\\|y | 1 |\n"


def test_a_lock_is_waited_for(tmp_path):
    """Whoever comes second sees what the first one did inside its block."""
    done, inside = [], threading.Event()

    def first():
        with waiting_lock(tmp_path / "lock"):
            inside.set()
            with pytest.raises(HeldError, match="another run is writing it"):
                lock(tmp_path / "lock")
            done.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with waiting_lock(tmp_path / "lock"):
        done.append("second")
    thread.join()
    assert done == ["first", "second"]
    lock(tmp_path / "lock").close()


def test_atomic_path_replaces_the_old_file_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "new" / "folder" / "out.json"
    write_text(target, "old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert temporary.parent == target.parent, "os.replace is atomic within one file system only"
        assert target.read_text() == "old", "a reader must see the old file until the new one is complete"
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_atomic_path_keeps_the_old_file_when_the_writer_fails(tmp_path):
    target = tmp_path / "out.json"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_atomic_path_follows_the_umask_and_restores_it(tmp_path, umask):
    """mkstemp makes files 0600, which no one else could read whatever the user's umask says."""
    before = os.umask(umask)
    try:
        write_text(tmp_path / "out", "x")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o666 & ~umask


def test_write_json_keeps_unicode_readable(tmp_path):
    write_json(tmp_path / "out.json", {"caption": "un café"})
    assert (tmp_path / "out.json").read_text(encoding="utf-8") == '{\n  "caption": "un café"\n}\n'


def test_a_checksum_is_that_of_the_content(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

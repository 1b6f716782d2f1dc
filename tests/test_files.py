"""strictjson.py: what Python takes in silence is refused in one line; every encoding with a mark is read."""

import base64
import io

import pytest
from PIL import Image

from captioning import files
from captioning.files import data_url, parse_json, read_json


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
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "'b' stands there twice"),
        (b"[NaN]", "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
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


def test_missing_and_too_large_files_are_told_before_reading(tmp_path, monkeypatch):
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

"""pipeline.py, p1_llava_caption.py and p2_infer.py: folders, lists and tars through the scripts."""

import json
import unicodedata
import zipfile

from level_captioner import picture, say
from shard_runs import EXPECTED, flags, manifest, pictures, results, run, write_tar

import p1_llava_caption
import p2_infer
from captioning.cli import BAD_INPUT, PARTIAL
from captioning.files import sha256_of


def test_a_folder_and_a_list_become_parts_too(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, content in pictures(0, 16):
        (folder / name).write_bytes(content)
    assert run(folder, tmp_path / "a.jsonl", shard_size=7) == 0
    (tmp_path / "list.txt").write_text("".join(f"{n:03d}.png\n" for n in range(16)))
    assert run(tmp_path / "list.txt", tmp_path / "b", form="jsonl", root=folder) == 0
    assert results(tmp_path / "a.jsonl") == results(tmp_path / "b") == EXPECTED
    assert len(list((tmp_path / "a.jsonl").glob("*.jsonl"))) == 3


def test_a_folder_is_listed_again_when_a_run_has_finished(tmp_path):
    folder, out = tmp_path / "images", tmp_path / "out.jsonl"
    folder.mkdir()
    for name, content in pictures(0, 5):
        (folder / name).write_bytes(content)
    assert run(folder, out, shard_size=2) == 0
    (folder / "009.png").write_bytes(picture(9))
    seen = []
    assert run(folder, out, lambda levels: seen.extend(levels) or say(levels), shard_size=2) == 0
    assert seen == [4, 9]
    for name in ("003.png", "004.png", "009.png"):
        (folder / name).unlink()
    assert run(folder, out, shard_size=2) == 0
    assert results(out) == {f"{k:03d}": f"level {k}" for k in range(3)}


def test_p2_infer_captions_tars_as_the_folder_that_they_were_made_of(tmp_path, tiny_data, tiny_profile, adapter):
    images = sorted((tiny_data / "images" / "val").iterdir())
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", [(p.name, p.read_bytes()) for p in images[number::2]])
    words = flags(tiny_profile, adapter)
    folder, tars, out = tiny_data / "images" / "val", str(tmp_path / "{0..1}.tar"), str(tmp_path / "tars.jsonl")
    assert p2_infer.main([str(folder), str(tmp_path / "folder.json"), *words]) == 0
    assert p2_infer.main([tars, out, *words]) == 0
    expected = json.loads((tmp_path / "folder.json").read_text())
    assert len(set(expected.values())) > 1
    assert results(out) == expected
    found = manifest(out)["run"]
    assert found["encoder_hash"] and found["decoder_hash"] and found["adapter"] == sha256_of(adapter)
    assert p2_infer.main([tars, out, *words, "--max-new-tokens", "3"]) == BAD_INPUT
    assert p2_infer.main([tars, out, *words, "--max-new-tokens", "3", "--overwrite"]) == 0
    write_tar(tmp_path / "1.tar", [("x.png", b"")])
    assert p2_infer.main([tars, out, *words, "--max-new-tokens", "3"]) == PARTIAL


def test_p2_infer_takes_pictures_globs_zips_and_subfolders(tmp_path, tiny_data, tiny_profile, adapter, caplog, capsys):
    """A single picture was "no such folder of images"; .bmp, .jfif and subfolders were left out without a word."""
    split, composed = (unicodedata.normalize(form, "é") for form in ("NFD", "NFC"))
    folder = tmp_path / "in"
    (folder / "sub" / split).mkdir(parents=True)
    first, second, third, *_ = sorted((tiny_data / "images" / "val").iterdir())
    for path, place in ((first, "a.jfif"), (second, "sub/b.jpg"), (third, f"sub/{split}/{split}.jpg")):
        (folder / place).write_bytes(path.read_bytes())
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for path in sorted(folder.rglob("*.j*")):
            archive.write(path, path.relative_to(folder))
    words, out = flags(tiny_profile, adapter), tmp_path / "out.json"

    def captions(*images, code=0, more=()):
        caplog.clear()
        assert p2_infer.main([*map(str, images), str(out), *words, *more]) == code
        return json.loads(out.read_text())

    whole = captions(folder, more=["--recursive"])
    assert list(whole) == ["a", "sub/b", f"sub/{composed}/{composed}"]
    assert captions(tmp_path / "in.zip", more=["--overwrite"]) == whole
    keyed = {key.rpartition("/")[2]: caption for key, caption in whole.items()}
    assert captions(folder / "a.jfif") == {"a": keyed["a"]}
    assert captions(folder / "sub" / "b.jpg", folder / "a.jfif") == {"b": keyed["b"], "a": keyed["a"]}
    assert captions(folder / "**" / "*.j*") == keyed
    assert captions(folder) == {"a": keyed["a"]}
    assert f"{folder}: 1 subfolder passed over: sub/; --recursive takes subfolders" in caplog.text
    parts = [str(out.with_suffix(".jsonl")), *words]
    assert p2_infer.main([str(folder), *parts, "--recursive"]) == 0
    assert results(parts[0]) == whole
    (folder / "c.webp").write_bytes(b"no picture")
    assert captions(folder / "a.jfif", folder / "c.webp", code=PARTIAL) == {"a": keyed["a"]}
    for images, message in (
        ([folder / "a.jfif"], "c.webp: is a picture; after the images comes OUT.json"),
        ([folder, folder / "a.jfif"], "give a folder, pictures, a list of paths"),
        ([tmp_path / "none.jpg"], "none.jpg: no such file; give a folder"),
        ([tmp_path / "none"], "none: no such folder of images"),
    ):
        last = str(folder / "c.webp") if "c.webp" in message else str(out)
        assert p2_infer.main([*map(str, images), last, *words]) == BAD_INPUT
        assert message in capsys.readouterr().err
    assert (folder / "c.webp").read_bytes() == b"no picture"


def test_llava_captions_a_list_as_its_folder(tmp_path, tiny_data):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted((tiny_data / "images" / "val").iterdir())[:3]:
        (folder / path.name).write_bytes(path.read_bytes())
    (tmp_path / "list.txt").write_text("".join(f"{path.name}\n" for path in sorted(folder.iterdir())))
    words = ["--profile", "micro", "--device", "cpu", "--max-new-tokens", "6"]
    assert p1_llava_caption.main([str(folder), str(tmp_path / "a.json"), *words]) == 0
    listed = [str(tmp_path / "list.txt"), str(tmp_path / "b.json"), *words]
    assert p1_llava_caption.main([*listed, "--list-root", str(folder)]) == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    found = json.loads((tmp_path / "b.manifest.json").read_text())
    assert len(found["run"]["weights_sha256"]) == 64
    assert p1_llava_caption.main([*listed, "--compare", "--annotation-file", str(tiny_data / "val.json")]) == 2
    pictures = sorted(map(str, folder.iterdir()))
    assert p1_llava_caption.main([*pictures, str(tmp_path / "c.json"), *words]) == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "c.json").read_bytes()
    assert p1_llava_caption.main([*pictures, *words]) == BAD_INPUT

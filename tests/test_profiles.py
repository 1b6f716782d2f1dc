"""profiles.py: names and paths, found from any folder, and nothing that a missing file would hide."""

from dataclasses import replace
from pathlib import Path

import pytest

from captioning import profiles
from captioning.profiles import PRESETS, PROFILES, download_part, downloaded_encoder, find, is_hub_id


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """An empty clone; the working directory is another folder."""
    for name in ("clone", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(profiles, "ROOT", tmp_path / "clone")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "clone"


def make(path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).touch()


def test_what_is_read_is_looked_for_here_first_and_then_beside_the_scripts(clone):
    assert find("weights/a.bin") == "weights/a.bin"  # nowhere: a message names it as the user knows it
    make(clone / "weights" / "a.bin")
    assert find("weights/a.bin") == str(clone / "weights" / "a.bin")
    make("weights/a.bin")
    assert find("weights/a.bin") == "weights/a.bin"
    assert find(str(clone / "weights")) == str(clone / "weights")


def test_a_profile_has_its_paths_as_they_are_when_it_is_asked_for(clone):
    full = PROFILES["full"]
    assert (full.data, full.llava) == ("hw3_data/p2_data", "weights/llava-1.5-7b-hf")
    for path in (full.data, full.llava, full.encoder_weights, full.clip_weights):
        make(clone / path)
    found = PROFILES["full"]
    for name in ("data", "tokenizer", "llava", "encoder_weights", "clip_weights"):
        assert getattr(found, name) == str(clone / getattr(full, name))
    assert found.clip_model == full.clip_model  # a name, not a path
    assert {name: profile.encoder for name, profile in PROFILES.items()}.keys() == {"full", "micro"}


def test_the_cache_is_beside_the_scripts_wherever_they_are_called_from(clone):
    Path("cache").mkdir()
    for cache, found in (("cache", clone / "cache"), ("demo/cache", clone / "demo/cache"), ("/a/cache", "/a/cache")):
        assert replace(PROFILES["full"], cache=cache).found().cache == str(found)


def test_the_courses_own_decoder_is_used_where_only_it_exists_when_it_is_asked_for(clone):
    profile = PROFILES["full"]
    preferred, other = profile.decoder_files
    assert profile.decoder == preferred
    make(clone / other)
    assert profile.decoder == str(clone / other)
    make(clone / preferred)
    assert profile.decoder == str(clone / preferred)
    make(other)
    assert profile.decoder == other
    make(preferred)
    assert profile.decoder == preferred


def test_a_downloaded_encoder_is_found_by_its_name_whatever_its_activation(clone):
    file = "weights/vit_large_patch14_clip_224.openai.safetensors"
    make(clone / file)
    assert downloaded_encoder("vit_large_patch14_clip_224") is None
    names = ("vit_large_patch14_clip_224.openai", "vit_large_patch14_clip_quickgelu_224.openai")
    assert [downloaded_encoder(name) for name in names] == [str(clone / file)] * 2
    make(file)
    assert [downloaded_encoder(name) for name in names] == [file] * 2


def test_a_presets_weights_are_named_before_they_are_there_with_the_part_that_fetches_them(clone):
    """Otherwise timm would fetch gigabytes without the user's knowledge, and a message would name another part."""
    for setting, name in PRESETS.items():
        file = downloaded_encoder(name)
        assert file == f"weights/{name}.safetensors"
        assert download_part(file) == download_part(str(clone / file)) == setting
        make(clone / file)
        assert downloaded_encoder(name) == str(clone / file)
    assert download_part(PROFILES["full"].encoder_weights) == download_part("mine.pt") == "p2"
    assert set(PROFILES["full"].presets) == set(PRESETS) and not PROFILES["micro"].presets


def test_the_profiles_own_folders_are_known(clone):
    paths = [path for profile in PROFILES.values() for path in (profile.data, profile.llava, *profile.decoder_files)]
    assert {Path(path).parts[0] for path in paths if not Path(path).is_absolute()} <= profiles.FOLDERS


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("llava-hf/llava-1.5-7b-hf", True),
        ("somebody/Model_2.0", True),
        ("weights/llava-1.5-7b-hf", False),
        ("weights/anything", False),
        ("WEIGHTS/anything", False),
        ("hw3_data/llava", False),
        ("demo/llava", False),
        ("cache/llava", False),
        ("runs/best", False),
        ("here/llava", False),
        ("beside/llava", False),
        ("llava", False),
        ("a/b/c", False),
        ("./a/b", False),
        ("../b", False),
        ("/a/b", False),
        ("~/b", False),
        (r"a\b/c", False),
        ("a/b\n", False),
        ("a/", False),
        ("", False),
    ],
)
def test_only_what_can_be_no_path_is_a_hub_id(clone, name, is_one):
    make("here/file")
    make(clone / "beside" / "file")
    assert is_hub_id(name) is is_one

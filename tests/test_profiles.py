"""profiles.py: names and paths, and nothing that a missing file would hide."""

from pathlib import Path

from captioning.profiles import PROFILES, downloaded_encoder


def test_the_courses_own_decoder_is_used_where_only_it_exists_when_it_is_asked_for(tmp_path, monkeypatch):
    profile = PROFILES["full"]
    preferred, other = profile.decoder_files
    monkeypatch.chdir(tmp_path)
    assert profile.decoder == preferred
    Path(other).parent.mkdir(parents=True)
    Path(other).touch()
    assert profile.decoder == other
    Path(preferred).touch()
    assert profile.decoder == preferred


def test_a_downloaded_encoder_is_found_by_its_name_whatever_its_activation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "vit_large_patch14_clip_224.openai.safetensors").touch()
    assert downloaded_encoder("vit_large_patch14_clip_224") is None
    for name in ("vit_large_patch14_clip_224.openai", "vit_large_patch14_clip_quickgelu_224.openai"):
        assert downloaded_encoder(name) == "weights/vit_large_patch14_clip_224.openai.safetensors"

"""profiles.py: names and paths, and nothing that a missing file would hide."""

from captioning.profiles import downloaded_encoder, first_there


def test_the_courses_own_decoder_is_taken_where_it_is_the_one_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert first_there("a.safetensors", "a.bin") == "a.safetensors"
    (tmp_path / "a.bin").touch()
    assert first_there("a.safetensors", "a.bin") == "a.bin"
    (tmp_path / "a.safetensors").touch()
    assert first_there("a.safetensors", "a.bin") == "a.safetensors"


def test_a_downloaded_encoder_goes_by_its_name_whatever_its_activation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "vit_large_patch14_clip_224.openai.safetensors").touch()
    assert downloaded_encoder("vit_large_patch14_clip_224") is None
    for name in ("vit_large_patch14_clip_224.openai", "vit_large_patch14_clip_quickgelu_224.openai"):
        assert downloaded_encoder(name) == "weights/vit_large_patch14_clip_224.openai.safetensors"

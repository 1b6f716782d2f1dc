"""--pool: averages of neighbouring patches, the same in training, cache, search, rewards and maps."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from runs import records, train
from tiny import SHAPE, TINY_ENCODER_KWARGS, make_captioner

import p2_infer
import p3_attention
from captioning.cli import BAD_INPUT
from captioning.inference.encode import cached_features
from captioning.maps.saved import load_maps
from captioning.models.adapter import read_adapter
from captioning.models.captioner import CaptionerConfig, average
from captioning.profiles import PROFILES

KWARGS = TINY_ENCODER_KWARGS | {"patch_size": 8}  # 6 x 6 patches


@pytest.fixture(autouse=True, scope="module")
def micro(tiny_profile):
    """A profile whose encoder has patches enough to pool."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROFILES, "micro", replace(tiny_profile, encoder_kwargs=KWARGS))
        yield


@pytest.fixture(scope="module")
def pooled_run(tmp_path_factory, micro):
    """A run of two epochs on averages of 2 x 2 patches."""
    out = tmp_path_factory.mktemp("pooled") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("captioning.scoring.evaluator.cider", lambda references, predictions: (0.5, {}))
        assert train(out, "--pool", 2) == 0
    return out


def captioner(pool, use_cls=True, **config):
    return make_captioner(use_cls=use_cls, kwargs=KWARGS, pool=pool, **config).eval()


def pixels(images=2):
    return torch.randn(images, 3, 48, 48, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("grid", [(2, 3), (4, 1), (1, 1)])
@pytest.mark.parametrize("pool", [1, 2, 3])
def test_an_average_is_that_of_a_square_of_neighbours(grid, pool):
    """Rows and columns exchanged, or neighbours in the flat order, would show where the grid is no square."""
    rows, columns = grid[0] * pool, grid[1] * pool
    patches = torch.randn(2, rows * columns, 5, generator=torch.Generator().manual_seed(0))
    wanted = F.avg_pool2d(patches.mT.unflatten(2, (rows, columns)), pool).flatten(2).mT
    assert torch.allclose(average(patches, grid, pool), wanted, atol=1e-6)
    assert torch.equal(average(torch.full_like(patches, 3.0), grid, pool), torch.full(wanted.shape, 3.0))


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("use_cls", [True, False])
def test_patches_are_averaged_before_or_after_the_projector_alike_and_cls_is_kept(use_cls, layer):
    whole, pooled = (captioner(pool, use_cls, encoder_layer=layer) for pool in (1, 2))
    assert (whole.feature_shape, pooled.feature_shape, pooled.grid) == ((37, 32), (10, 32), (3, 3))
    assert (pooled.n_prefix, len(pooled.patch_columns)) == (9 + use_cls, 9)
    ours, theirs = pooled.encode(pixels()), whole.encode(pixels())
    assert torch.equal(ours[:, 0], theirs[:, 0])
    after = whole.prefix(theirs)[:, int(use_cls) :]
    assert torch.allclose(pooled.prefix(ours)[:, int(use_cls) :], average(after, (3, 3), 2), atol=1e-5)


@pytest.mark.parametrize("pool", [4, 5, 12])
def test_a_grid_that_does_not_divide_is_refused_with_what_does(pool, tmp_path, capsys):
    with pytest.raises(ValueError, match=f"--pool {pool}: does not divide the 6 x 6 patches .* choose from 1, 2, 3, 6"):
        captioner(pool)
    assert train(tmp_path / "run", "--pool", pool) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--pool {pool}" in line and not list(tmp_path.rglob("*.safetensors"))


def test_adapters_of_the_last_version_pool_nothing():
    plain = vars(captioner(1).config) | {"lora": {"rank": 3}}
    del plain["pool"]
    assert CaptionerConfig.from_dict(plain).pool == 1
    with pytest.raises(ValueError, match="pool 0"):
        CaptionerConfig.from_dict(plain | {"pool": 0})


def test_averages_have_a_cache_of_their_own_and_it_is_smaller(tmp_path, tiny_data):
    paths = sorted((tiny_data / "images" / "val").glob("*"))[:3]
    whole, pooled = (cached_features(captioner(pool), paths, tmp_path) for pool in (1, 2))
    sizes = sorted(file.stat().st_size for file in tmp_path.rglob("features.bin"))
    assert sizes == [3 * 10 * 32 * 2, 3 * 37 * 32 * 2]
    rounded = average(whole.gather([0, 1, 2])[:, 1:].float(), (3, 3), 2)
    assert torch.allclose(pooled.gather([0, 1, 2])[:, 1:].float(), rounded, atol=2e-3)  # float16's


def test_losses_are_the_same_whether_averages_are_cached_or_encoded_every_time(pooled_run, tmp_path, constant_score):
    assert train(tmp_path / "run", "--pool", 2, "--cache", tmp_path / "cache", "--cache-gb", 0) == 0
    for kind, key in (("step", "loss"), ("epoch", "val_loss")):
        cached, encoded = ([record[key] for record in records(out, kind)] for out in (pooled_run, tmp_path / "run"))
        assert encoded == pytest.approx(cached, abs=1e-4)


def test_the_adapter_says_how_to_pool_to_all_that_use_it(pooled_run, tmp_path, tiny_data, constant_score, capsys):
    adapter, images = pooled_run / "best.safetensors", tiny_data / "images" / "val"
    assert read_adapter(adapter)[0].pool == 2
    common = ["--profile", "micro", "--adapter", str(adapter), "--device", "cpu", "--beam-size", "2"]
    captions = tmp_path / "captions.json"
    assert p2_infer.main([str(images), str(captions), PROFILES["micro"].decoder, *common]) == 0
    assert len(json.loads(captions.read_text())) == 8
    picture = sorted(images.iterdir())[0]
    assert (
        p3_attention.main(
            [*common, "--model", "p2", "--images", str(picture), "--method", "raw", "--out", str(tmp_path / "maps")]
        )
        == 0
    )
    assert {load_maps(file).word_maps[0].maps.shape[1:] for file in (tmp_path / "maps").glob("*.npz")} == {(3, 3)}
    scst = ("--objective", "scst", "--init-adapter", adapter, "--samples", 2, "--epochs", 1)
    assert train(tmp_path / "tuned", *scst) == 0
    assert read_adapter(tmp_path / "tuned" / "best.safetensors")[0].pool == 2
    assert train(tmp_path / "other", *scst, "--pool", 3) == BAD_INPUT
    assert "--pool 3: --init-adapter" in capsys.readouterr().err


def test_a_run_is_resumed_with_its_own_pooling_and_old_runs_with_none(pooled_run, tmp_path, constant_score, capsys):
    assert train(pooled_run, "--resume", "--pool", 3) == BAD_INPUT
    assert "train.pool, captioner.pool" in capsys.readouterr().err
    assert train(tmp_path / "run", "--epochs", 1) == 0
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    del described["train"]["pool"], described["captioner"]["pool"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(described))
    assert train(tmp_path / "run", "--epochs", 1, "--resume") == 0


def test_a_context_that_is_too_short_names_pooling_as_the_remedy():
    with pytest.raises(ValueError, match=r"37 image tokens leave no room .* --pool 2 makes a quarter"):
        captioner(1, shape=replace(SHAPE, n_positions=38))
    assert captioner(2, shape=replace(SHAPE, n_positions=38)).n_prefix == 10

"""bench/scale_study: rates, shards, the simulation against closed forms, and the page."""

import json
import math
import random
from dataclasses import replace
from statistics import mean

import pytest

from bench import arithmetic
from bench.scale_study import __main__ as study
from bench.scale_study import costs, model
from bench.scale_study.__main__ import MOST, Quantity
from bench.scale_study.model import Cluster, Job, Workload, workloads

HOUR = 3600.0
COSTS = json.loads((study.HERE / "costs.json").read_text())
SECOND = Workload("a second an image", image_bytes=1e-6, cpu_s=1e-6, stages={"encode": 1.0}, batch=1)


@pytest.fixture
def quick(monkeypatch):
    """Few draws and few sizes of shards, for tests of anything but the figures."""
    monkeypatch.setattr(study, "SEEDS", range(1))
    monkeypatch.setattr(study, "SHARDS", (100_000, 300_000))


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_script_gives(capsys):
    """Every figure of docs/billion_images.md; after a change of the model: python -m bench.scale_study --write."""
    assert study.main(["--check"]) == 0, capsys.readouterr().out


def test_a_figure_that_was_changed_by_hand_is_noticed(tmp_path, monkeypatch, quick):
    page, document = study.DOCUMENT.read_text(), tmp_path / "page.md"
    monkeypatch.setattr(study, "DOCUMENT", document)
    assert study.main(["--check"]) == 1  # there is none
    assert study.main(["--write"]) == 0
    assert study.main(["--check"]) == 0
    for name in ("scale_rates.png", "scale_shards.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (study.ROOT / "docs" / name).is_file() and f"]({name})" in page
    document.write_text(document.read_text().replace("6,335", "6,336", 1))
    assert study.main(["--check"]) == 1


def test_what_the_page_says_in_words_holds():
    """The words are in the template; new costs could make them wrong while the tables are right."""
    cluster = Cluster()
    tuned, llava = workloads(COSTS, cluster)
    jobs = {(work.name, n): Job(work, cluster, n, 1e9) for work in (tuned, llava) for n in study.GPUS}
    bound = {key: min(job.capacities, key=job.capacities.get) for key, job in jobs.items()}
    assert [bound[tuned.name, n] for n in study.GPUS] == ["GPU", "GPU", "store"]
    assert {bound[llava.name, n] for n in study.GPUS} == {"GPU"}
    assert jobs[tuned.name, 8].capacities["CPU cores"] > 1.5 / tuned.gpu_s  # "enough"
    assert llava.stages["read"] > llava.gpu_s / 2  # "mostly its prompt being read"
    assert workloads(COSTS, replace(cluster, launch=1e-12))[0].stages["search"] < tuned.stages["search"]
    for work, small in ((tuned, True), (llava, False)):  # a tar of 1 GB: too small for one, right for the other
        job = jobs[work.name, MOST]
        lost, least = (job.losses(shard)["all"] for shard in (1e9 / work.image_bytes, job.best_shard))
        assert (lost > 2 * least) == small
        assert cluster.failures < 0.1 / job.seconds  # the end of the job matters, and not the failures


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--write", "--price", "1"], "--write and --check are for the defaults"),
        (["--check", "--images", "1e8"], "--write and --check are for the defaults"),
        (["--images", "10"], "--images 10: must be from 1e6 to 1e10"),
        (["--price", "0"], "--price 0: must be a positive number"),
        (["--cores-a-gpu", "-1"], "--cores-a-gpu -1: must be a positive number"),
    ],
)
def test_bad_flags_are_refused(flags, message, capsys):
    assert study.main(flags) == 2
    assert message in capsys.readouterr().err


def test_other_assumptions_give_other_tables_without_the_words(quick, capsys):
    assert study.main(["--images", "2e6", "--store", "1e8", "--rate", "250"]) == 0
    text = capsys.readouterr().out
    assert "| captioner | 8 | 1,579 | 9,706 | **77.7** | 250 | store |" in text
    assert "measured 4 |" in text and "assumed launches" not in text


def test_costs_are_measured(tmp_path, monkeypatch):
    """In small: the file has every figure that the study asks for, and a big photograph takes longer to decode."""
    monkeypatch.setattr(costs, "SIZES", ((160, 120), (800, 600)))
    out = tmp_path / "costs.json"
    assert costs.main(["--images", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found.keys() == COSTS.keys()
    assert all(value > 0 for value in found.values() if not isinstance(value, str))
    assert found["decode_phone_s"] > found["decode_s"]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0, "%", "< 0.01 %"),
        (0.0004, "%", "0.04 %"),
        (0.0123, "%", "1.2 %"),
        (1.0, "%", "100 %"),
        (0.95, "time", "57 min"),
        (15.64, "time", "15.6 h"),
        (370, "time", "15.4 days"),
        (5e10, "GB", "50 GB"),
        (310_607.4, "", "310,607"),
    ],
)
def test_quantities_as_text(value, unit, text):
    assert f"{Quantity(value):{unit}}" == text


# --- rates ------------------------------------------------------------------------------------------------------------


def test_the_scarcest_resource_sets_the_rate():
    cluster = Cluster(cores_a_gpu=10, core_share=1.0, network=800.0, store=2000.0, gpus_a_node=4)
    work = Workload("any", image_bytes=10.0, cpu_s=0.5, stages={"encode": 0.03, "search": 0.02}, batch=1)
    one, eight, many = (Job(work, cluster, gpus, 1e6) for gpus in (1, 8, 100))
    assert one.capacities == pytest.approx({"CPU cores": 20, "network": 80, "store": 200, "GPU": 20})
    assert eight.capacities == pytest.approx({"CPU cores": 20, "network": 20, "store": 25, "GPU": 20})
    assert (many.rate, many.seconds) == (2.0, 5000.0)


def test_a_step_of_the_search_costs_what_is_slowest():
    models = arithmetic.CaptionerShape()
    ideal = Cluster(launch=1e-12, step_share=1.0, encode_share=1.0)

    def search(**changes):
        return workloads(COSTS, replace(ideal, **changes))[0].stages["search"]

    assert search(launch=1e-3) == pytest.approx(30 * 12 * 20 * 1e-3 / 64)
    assert search(bandwidth=1e9) == pytest.approx(models.search_bytes(5, 30, 64) / 1e9)
    assert search(products=1e12) == pytest.approx(models.search(5, 30) / 1e12)


# --- shards and failures ----------------------------------------------------------------------------------------------


def job(gpus, images, hours=1e9, **changes):
    """A job of an image a second and GPU, without overhead."""
    changes = {"shard_overhead": 1e-9, "gpus_a_node": 1, **changes}
    return Job(SECOND, Cluster(mtbf_hours=hours, **changes), gpus, images)


@pytest.mark.parametrize("hours", [2, 20])
def test_the_expected_time_equals_the_simulation(hours):
    """Closed forms against 20,000 shards of an hour on one GPU: the time in all, and the part that is done again."""
    one = job(1, 20_000 * HOUR, hours)
    lost, redone = one.simulate(HOUR, jitter=0, seed=3)
    assert lost == pytest.approx(one.losses(HOUR)["failures"], rel=0.06)
    assert redone == pytest.approx(one.redone(HOUR), rel=0.06)


def test_the_expected_work_done_again_equals_the_simulation_of_a_cluster():
    cluster = job(64, 5_000 * 600.0, hours=3, gpus_a_node=8)
    assert mean(cluster.simulate(600, seed=n)[1] for n in range(10)) == pytest.approx(cluster.redone(600), rel=0.1)


def failing(monkeypatch, *moments):
    """Let the nodes fail at these moments, and not again."""

    class Fixed(random.Random):
        left = [*moments]  # noqa: RUF012

        def expovariate(self, _):
            return self.left.pop(0) if self.left else math.inf

    monkeypatch.setattr(model.random, "Random", Fixed)


def test_a_node_takes_all_of_its_gpus_down(monkeypatch):
    failing(monkeypatch, 150.0, math.inf)
    _, redone = job(8, 1000 * 100.0, gpus_a_node=4).simulate(100, jitter=0)
    assert redone == pytest.approx(4 * 50 / (1000 * 100))


def test_a_lost_shard_goes_to_a_gpu_that_is_idle(monkeypatch):
    failing(monkeypatch, 60.0, math.inf)
    lost, redone = job(2, 200.0, restart=500.0).simulate(100, jitter=0)
    assert lost == pytest.approx(2 * 200 / 200 - 1)  # the other one takes it when it is free
    assert redone == pytest.approx(60 / 200)


def test_a_node_comes_back_after_the_restart(monkeypatch):
    failing(monkeypatch, 60.0)
    assert job(1, 100.0, restart=30.0).simulate(100, jitter=0)[0] == pytest.approx((60 + 30 + 100) / 100 - 1)


def test_the_remainder_of_the_division_is_waited_for():
    lost, redone = job(3, 10 * 2.0).simulate(2, jitter=0)
    assert (lost, redone) == (pytest.approx(3 * 8 / 20 - 1), 0.0)


def test_unequal_times_keep_their_mean():
    assert job(1, 20_000 * 10.0).simulate(10, jitter=0.3)[0] == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("hours", [6335.0, 2.0])
def test_the_best_shard_loses_least(hours):
    largest = Job(workloads(COSTS, Cluster())[1], Cluster(mtbf_hours=hours), 512, 1e9)
    least = largest.losses(largest.best_shard)["all"]
    for factor in (0.5, 0.7, 1.5, 2):
        assert least < largest.losses(factor * largest.best_shard)["all"]


def test_losses_of_a_shard_by_hand():
    five = job(5, 1000, shard_overhead=2.0, restart=1.0)  # shards of 10 s, 200 s in all
    expected = {"overhead": 0.2, "failures": 0.0, "tail": 12 / 2 / 200, "all": 0.23}
    assert five.losses(10) == pytest.approx(expected, abs=1e-6)

"""bench/simulate.py and what it stands on: rates, shards, the event simulation against closed forms, and the page."""

import json
import math
import random
from dataclasses import replace
from statistics import mean

import pytest

from bench import arithmetic, costmodel, costs, simulate, study
from bench.cluster import Job, Node, Simulation
from bench.cluster import simulate as play
from bench.costmodel import Cluster, Workload

HOUR = 3600.0
COSTS = json.loads(simulate.COSTS.read_text())
PAGE = simulate.DOCUMENT.read_text()


@pytest.fixture(scope="module")
def defaults():
    """The study of the page."""
    return simulate.load_study(simulate.build_parser().parse_args([]))


@pytest.fixture
def quick(monkeypatch):
    """Few draws and few sizes of shards, for tests of anything but the figures."""
    monkeypatch.setattr(study, "SEEDS", range(2))
    monkeypatch.setattr(study, "SHARDS", (30_000, 300_000))


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_script_gives(capsys):
    """Every figure of docs/scale.md; after a change of the model: python -m bench.simulate --write."""
    assert simulate.main(["--check"]) == 0, capsys.readouterr().out


def test_a_figure_that_was_changed_by_hand_is_noticed(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(simulate, "DOCUMENT", tmp_path / "scale.md")
    assert simulate.main(["--check"]) == 1  # there is none
    assert simulate.main(["--write"]) == 0
    assert simulate.main(["--check"]) == 0
    for name in ("scale_rates.png", "scale_shards.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (simulate.ROOT / "docs" / name).is_file() and f"]({name})" in PAGE
    text = (tmp_path / "scale.md").read_text()
    (tmp_path / "scale.md").write_text(text.replace("6,335", "6,336", 1))
    assert simulate.main(["--check"]) == 1


def test_what_the_page_says_in_words_holds(defaults):
    """The words stand in the template; new costs could make them wrong while the tables are right."""
    tuned, llava = defaults.works
    cluster = defaults.cluster
    assert [costmodel.bottleneck(tuned, cluster, n)[0] for n in (1, 8, 512)] == ["GPU", "GPU", "store"]
    assert {costmodel.bottleneck(llava, cluster, n)[0] for n in (1, 8, 512)} == {"GPU"}
    assert costmodel.capacities(tuned, cluster, 8)["CPU cores"] > 1.5 / tuned.gpu_s  # "enough here"
    phone = replace(tuned, cpu_s=tuned.cpu_s + COSTS["decode_phone_s"])
    assert costmodel.capacities(phone, cluster, 8)["CPU cores"] < 0.2 / tuned.gpu_s  # "far from enough"
    assert COSTS["decode_phone_draft_s"] < 0.5 * COSTS["decode_phone_s"]  # "a good part"
    assert llava.stages["read"] > llava.gpu_s / 2  # "mostly its prompt being read"
    if not tuned.measured:
        without = costmodel.captioner(COSTS, replace(cluster, launch=1e-12))
        assert without.stages["search"] < tuned.stages["search"]
    for work, small in ((tuned, True), (llava, False)):  # a tar of 1 GB: too small for one, right for the other
        rate = costmodel.bottleneck(work, cluster, 512)[1]
        lost = costmodel.losses(1e9 / work.image_bytes, 1e9, rate, 512, cluster).total
        best = costmodel.losses(defaults.shard(work), 1e9, rate, 512, cluster).total
        assert (lost > 2 * best) == small
        assert cluster.failures < 0.1 * 512 * rate / 1e9  # the end of the job matters, and not the failures


def test_the_readme_quotes_the_page(defaults):
    """Its short table has the bill's own strings, row by row."""
    text = (simulate.ROOT / "README.md").read_text()
    section = text[text.index("### On paper: a billion images") : text.index("### Rehearsal at full size")]
    found = study.bill(defaults)
    assert [(row["workload"], row["GPUs"]) for row in found] == [
        (work.name, str(gpus)) for work in defaults.works for gpus in study.GPUS
    ]
    one, eight, many = ([found[n], found[n + 3]] for n in range(3))
    quoted = [
        [row["images/s"] for row in one],
        [f"{a['time']}; {b['time']}" for a, b in zip(one, eight, strict=True)],
        [f"${a['$ a million']}; on 512 GPUs ${b['$ a million']}" for a, b in zip(one, many, strict=True)],
    ]
    for cells in quoted:
        assert f"| {' | '.join(cells)} |" in section
    assert all(row["time"] in section for row in many)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--write", "--price", "1"], "--write and --check are for the defaults"),
        (["--check", "--images", "1e8"], "--write and --check are for the defaults"),
        (["--images", "10"], "--images 10: must be from 1e6 to 1e10"),
        (["--price", "0"], "--price 0.0: must be a positive number"),
        (["--cores-a-gpu", "-1"], "--cores-a-gpu -1: must be a positive number"),
        (["--costs", "none.json"], "none.json"),
    ],
)
def test_bad_flags_are_refused(flags, message, capsys):
    assert simulate.main(flags) == 2
    assert message in capsys.readouterr().err


def test_costs_without_a_figure_are_refused(tmp_path, capsys):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({k: v for k, v in COSTS.items() if k != "decode_s"}))
    assert simulate.main(["--costs", str(path)]) == 2
    assert "no decode_s; write it with python -m bench.costs" in capsys.readouterr().err


def test_other_assumptions_give_other_tables(quick, capsys):
    assert simulate.main(["--images", "2e6", "--store", "1e8", "--price", "1"]) == 0
    text = capsys.readouterr().out
    assert "| captioner | 8 | 1,579 | 9,706 | **77.7** | 764 | store |" in text
    assert "#" not in text and text.count("|---|") >= len(study.TABLES)  # without the words, which are of the page's


def rehearsal(path, **changes):
    """A file as bench/full_size.sh writes one on a GPU."""
    found = {
        "tiny": False,
        "machine": "a GPU",
        "matrix_rates": {"fp32": 5e13, "bf16": 6e14},
        "copy_rate": 3e12,
        "rows": [{"part": "inference", "a second": 250.0}],
        **changes,
    }
    path.write_text(json.dumps(found))
    return str(path)


def test_a_rehearsal_takes_the_place_of_assumptions(tmp_path, quick, monkeypatch, capsys):
    path = rehearsal(tmp_path / "full_size.json")
    found = simulate.load_study(simulate.build_parser().parse_args(["--rehearsal", path]))
    tuned, llava = found.works
    assert (tuned.gpu_s, tuned.measured, llava.measured) == (1 / 250, True, False)
    assert (found.cluster.products, found.cluster.bandwidth) == (6e14, 3e12)
    assert llava.stages["read"] == pytest.approx(arithmetic.llava_operations(40, 16)[1] / (6e14 * 0.4))
    monkeypatch.setattr(simulate, "REHEARSAL", tmp_path / "full_size.json")
    assert simulate.main([]) == 0
    text = capsys.readouterr().out
    assert "captioner measured on a GPU" in text and "assumed launches" not in text and "CUDA graphs" not in text


@pytest.mark.parametrize("changes", [{"tiny": True}, {"matrix_rates": {"fp32": 1e11}}, {"rows": []}])
def test_a_rehearsal_that_was_not_on_a_gpu_is_refused(changes, tmp_path, capsys):
    assert simulate.main(["--rehearsal", rehearsal(tmp_path / "full_size.json", **changes)]) == 2
    assert "write it with bash bench/full_size.sh --out" in capsys.readouterr().err


def test_costs_are_measured(tmp_path):
    """In small: the file has every figure that the script asks for, and a phone's photograph takes longer to decode."""
    out = tmp_path / "costs.json"
    assert costs.main(["--tiny", "--images", "3", "--captions", "1", "--repeats", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found.keys() == COSTS.keys()
    assert all(value > 0 for value in found.values() if not isinstance(value, str))
    assert found["decode_phone_s"] > found["decode_s"]


# --- rates ------------------------------------------------------------------------------------------------------------


def test_the_scarcest_resource_sets_the_rate():
    cluster = Cluster(cores_a_gpu=10, core_share=1.0, network=800.0, store=2000.0, gpus_a_node=4)
    work = Workload("any", image_bytes=10.0, cpu_s=0.5, stages={"encode": 0.03, "search": 0.02}, batch=1)
    assert costmodel.capacities(work, cluster, 1) == pytest.approx(
        {"CPU cores": 20, "network": 80, "store": 200, "GPU": 20}
    )
    assert costmodel.capacities(work, cluster, 8) == pytest.approx(
        {"CPU cores": 20, "network": 20, "store": 25, "GPU": 20}
    )
    assert costmodel.bottleneck(work, cluster, 100) == ("store", 2.0)


def test_a_step_of_the_search_costs_what_is_slowest():
    models = arithmetic.Captioner()
    slow = {"launch": 1e-3, "step_share": 1.0, "encode_share": 1.0}
    launches = costmodel.captioner(COSTS, Cluster(**slow)).stages["search"]
    assert launches == pytest.approx(30 * 12 * 20 * 1e-3 / 64)
    moved = costmodel.captioner(COSTS, Cluster(**{**slow, "launch": 1e-12, "bandwidth": 1e9})).stages["search"]
    assert moved == pytest.approx(models.search_bytes(5, 30, 64) / 1e9)
    products = costmodel.captioner(COSTS, Cluster(**{**slow, "launch": 1e-12, "products": 1e12})).stages["search"]
    assert products == pytest.approx(models.search(5, 30) / 1e12)


# --- shards and failures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mtbf", [2 * HOUR, 20 * HOUR])
def test_expected_time_of_a_shard_equals_the_simulation(mtbf):
    """Closed form against 20,000 shards on one worker: the time in all, and the part that is done again."""
    length, restart, count = HOUR, 900.0, 20_000
    found = play(Job(count, length, workers=1, failures=1 / mtbf, restart=restart), seed=3)
    assert found.useful == pytest.approx(count * length)
    assert found.makespan / count == pytest.approx(costmodel.shard_seconds(length, 1 / mtbf, restart), rel=0.03)
    assert found.redone / count == pytest.approx(costmodel.redone_seconds(length, 1 / mtbf), rel=0.05)
    assert found.lost_shards / count == pytest.approx(math.expm1(length / mtbf), rel=0.05)


def test_expected_work_done_again_equals_the_simulation_of_a_cluster():
    job = Job(5_000, 600.0, workers=64, failures=1 / (3 * HOUR), restart=900.0)
    found = [play(job, seed) for seed in range(10)]
    expected = job.shards * costmodel.redone_seconds(job.shard, job.failures)
    assert mean(o.redone for o in found) == pytest.approx(expected, rel=0.1)
    assert {round(o.useful) for o in found} == {5_000 * 600}  # every shard is done once, whatever fails
    for outcome in found:
        spent = outcome.useful + outcome.redone + outcome.down
        assert spent <= outcome.workers * outcome.makespan + job.workers * job.restart


def test_a_node_takes_all_of_its_workers_down():
    simulation = Simulation(Job(1000, 100.0, workers=8, workers_a_node=4))
    for node, moment in zip(simulation.nodes, (150.0, 1e9), strict=True):
        node.failed, node.next_failure = [moment], lambda now, at=moment: at if now < at else math.inf
    outcome = simulation.run()
    assert outcome.lost_shards == 4
    assert outcome.redone == pytest.approx(4 * 50.0)


def test_a_lost_shard_goes_to_whoever_is_idle():
    simulation = Simulation(Job(2, 100.0, workers=2, workers_a_node=1, restart=500.0))
    simulation.speeds = [1.0, 4.0]
    first = simulation.nodes[0]
    first.failed, first.next_failure = [60.0], lambda now: 60.0 if now < 60 else math.inf
    outcome = simulation.run()
    assert outcome.makespan == pytest.approx(60 + 25)  # the idle, fast one takes it at once
    assert (outcome.lost_shards, outcome.redone) == (1, 60.0)


@pytest.mark.parametrize(("claiming", "makespan"), [(True, 8.0), (False, 8.0)])
def test_equal_workers_without_failures(claiming, makespan):
    found = play(Job(10, 2.0, workers=3, claiming=claiming))
    assert found.makespan == makespan
    assert (found.useful, found.redone, found.idle) == (20.0, 0.0, 4.0)


def test_claiming_shards_spares_the_others_a_slow_worker():
    slow = {"workers": 4, "workers_a_node": 1}
    times = {}
    for claiming in (True, False):
        simulation = Simulation(Job(400, 1.0, claiming=claiming, **slow))
        simulation.speeds = [0.5, 1.0, 1.0, 1.0]
        times[claiming] = simulation.run().makespan
    assert times[False] == pytest.approx(200)
    assert times[True] == pytest.approx(400 / 3.5, rel=0.03)


def test_nodes_come_back_after_the_restart():
    node = Node(Job(1, 1.0, 1, failures=1 / 100, restart=10.0), random_numbers=random.Random(0))
    first = node.next_failure(0.0)
    assert node.up_from(first - 1e-6) == first - 1e-6
    assert node.up_from(first + 4) == pytest.approx(first + 10)
    assert node.up_from(first + 10) == first + 10
    assert node.next_failure(first) > first + 10
    assert Node(Job(1, 1.0, 1), None).next_failure(5.0) == math.inf


def test_unequal_times_keep_their_mean():
    found = play(Job(20_000, 10.0, workers=10, jitter=0.3))
    assert found.useful / 20_000 == pytest.approx(10.0, rel=0.01)


@pytest.mark.parametrize("mtbf_hours", [6335.0, 2.0])
def test_the_best_shard_loses_least(mtbf_hours):
    cluster = Cluster(mtbf_hours=mtbf_hours)
    best = costmodel.best_shard(1e9, 35.0, 512, cluster)
    least = costmodel.losses(best, 1e9, 35.0, 512, cluster).total
    for factor in (0.5, 0.8, 1.25, 2):
        assert least < costmodel.losses(factor * best, 1e9, 35.0, 512, cluster).total


def test_losses_of_a_shard_by_hand():
    cluster = Cluster(shard_overhead=2.0, mtbf_hours=1e9, restart=1.0)
    found = costmodel.losses(100, images=10_000, rate=10.0, gpus=5, cluster=cluster)  # 10 s a shard, 200 s in all
    assert found.overhead == pytest.approx(0.2)
    assert found.tail == pytest.approx(12 / 2 / 200)
    assert found.redone == pytest.approx(0, abs=1e-6)
    assert found.total == pytest.approx(0.23)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "< 0.01 %"), (0.00004, "< 0.01 %"), (0.0004, "0.04 %"), (0.0123, "1.2 %"), (1.0, "100 %")]
)
def test_shares_as_text(value, text):
    assert study.percent(value) == text

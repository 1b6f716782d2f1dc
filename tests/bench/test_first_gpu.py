"""bench/first_gpu.py in its small form on the CPU: every part runs, failures are kept, the README's table is filled."""

import json

import pytest
import torch

from bench import first_gpu as bench
from bench import gpu_parts
from captioning.cli import BAD_INPUT, PARTIAL
from captioning.profiles import ROOT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What all parts find in small, in this process."""
    parts = {}
    for part in bench.PARTS:
        folder = tmp_path_factory.mktemp(part)
        parts[part] = gpu_parts.measure(part, gpu_parts.Setup(CPU, quick=True, folder=folder))
    return {"machine": "a machine | of ours", "quick": True, "parts": parts}


def test_every_part_runs_and_says_what_it_took(found):
    for part, result in found["parts"].items():
        assert "error" not in result, (part, result)
        assert result["rows"] and result["seconds"] > 0 and result["host_gb"] > 0.05
        assert result["cuda_gb"] is None
        json.dumps(result)


def test_the_parts_measure_what_they_say(found):
    rows = {part: result["rows"] for part, result in found["parts"].items()}
    facts = {row["fact"]: row["is"] for row in rows["build"]}
    assert facts["flash attention"].startswith("built: ") and "TFLOP/s" in facts["matrix products in fp32"]
    for row in rows["attention"]:
        assert 0 < row["output off by"] < 0.01 and 0 < row["gradient off by"] < 0.01
    assert [row["route"] for row in rows["attention"]] == ["packed", "mask"]
    assert [row["cuDNN"] for row in rows["cudnn"]] == ["off", "allowed"]
    assert [(row["search"], row["as eager"]) for row in rows["decode"]] == [("eager", "2 of 2"), ("compiled", "2 of 2")]
    assert [row["precision"] for row in rows["train"] if row["who"] == "ours"] == ["fp32", "bf16"]
    assert [row["how"] for row in rows["cache"]] == ["ours", "one batch after another", "reading alone"]
    assert rows["scst"][0]["s a step"] == pytest.approx(sum(rows["scst"][0][f"{part}, s"] for part in SCST))
    assert rows["llava"][0]["answers that differ"] == 0


SCST = ("draw", "reward", "gradient")


def test_cudnns_attention_is_left_as_it_was(tmp_path):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    for setting in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(setting)
        gpu_parts.cudnn(gpu_parts.Setup(CPU, quick=True, folder=tmp_path))
        assert torch.backends.cuda.cudnn_sdp_enabled() is setting
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_the_table_has_a_figure_for_every_part_that_was_measured(found):
    filled = bench.table(found)
    assert bench.NOT_MEASURED not in filled and "a machine / of ours" in filled
    assert filled.count("\n") == 3
    rows = dict(found["parts"], scst={"error": "RuntimeError: no | kernel", "seconds": 1.0})
    rows["cache"] = rows["cache"] | {"cuda_gb": 3.21}
    del rows["llava"]
    cells = bench.table(found | {"parts": rows}).splitlines()[2].strip("| ").split(" | ")
    assert cells[3].endswith(" images/s, 3.2 GB")
    assert cells[4:] == ["failed", bench.NOT_MEASURED]


def test_the_readmes_table_is_the_one_that_the_command_writes():
    """Until it has run on a GPU nothing is claimed; what it writes has the same columns."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text.partition(bench.BEGIN)[2].partition(bench.END)[0].strip().splitlines()
    expected = bench.table(None).splitlines()
    assert shown[:2] == expected[:2] and len(shown) == 3
    assert shown[2] == expected[2] or bench.NOT_MEASURED not in shown[2]


def fail(setup):
    raise RuntimeError("no kernel image is available. Compile it")


def test_a_part_that_fails_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def run_part(part, args):
        return gpu_parts.measure(part, gpu_parts.Setup(CPU, args.quick, tmp_path))

    monkeypatch.setitem(bench.PARTS, "attention", fail)
    monkeypatch.setattr(bench, "run_part", run_part)
    words = ["--device", "cpu", "--quick", "--parts", "attention", "cudnn", "--out", str(tmp_path / "gpu")]
    assert bench.main(words) == PARTIAL
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts["attention"]["error"] == "RuntimeError: no kernel image is available"
    assert "rows" in parts["cudnn"]
    written = (tmp_path / "gpu.md").read_text()
    assert "**failed**: RuntimeError" in written and "| allowed |" in written
    assert "| allowed |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "minutes", "error"),
    [
        ("import os; os.abort()", 1, "exit code -6"),
        ("import time; time.sleep(60)", 0.01, "longer than --minutes 0.01"),
    ],
)
def test_a_part_that_ends_its_process_or_hangs_is_recorded(tmp_path, monkeypatch, script, minutes, error):
    run = bench.subprocess.run
    monkeypatch.setattr(bench.subprocess, "run", lambda words, **kw: run([words[0], "-c", script], **kw))
    args = bench.build_parser().parse_args(["--device", "cpu", "--minutes", str(minutes)])
    assert error in bench.run_part("build", args)["error"]


def test_parts_run_in_processes_of_their_own(tmp_path):
    words = ["--device", "cpu", "--quick", "--parts", "build", "--out", str(tmp_path / "gpu")]
    assert bench.main(words) == 0
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"]["build"]["rows"]


def test_the_readme_is_filled_from_a_gpu_only(tmp_path, monkeypatch, found, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{bench.BEGIN}\nold\n{bench.END}\nafter\n")
    words = ["--readme", str(readme)]
    for more in (["--device", "cpu"], ["--device", "cpu", "--quick"]):
        assert bench.main([*words, *more]) == BAD_INPUT
    assert "old" in readme.read_text()
    monkeypatch.setattr(bench, "in_child", lambda survey, name: ("cuda", "H100"))
    monkeypatch.setattr(bench, "run_part", lambda part, args: found["parts"][part])
    assert bench.main(words) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n\n{bench.BEGIN}\n| ") and text.endswith(f"|\n{bench.END}\nafter\n")
    assert "old" not in text and "H100" in text
    readme.write_text("no marks")
    assert bench.main(words) == BAD_INPUT
    assert "has no lines <!-- first_gpu: begin -->" in capsys.readouterr().err

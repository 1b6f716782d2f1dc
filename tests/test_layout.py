"""The shape of the repository: who may import whom, nothing heavy at import, and command lines that all answer."""

import ast
import importlib
import subprocess
import sys

import pytest

from captioning.profiles import ROOT

FOLDERS = ("captioning/**", "microworld", "bench/**")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for pattern in ("*.py", *(f"{folder}/*.py" for folder in FOLDERS))
    for path in sorted(ROOT.glob(pattern))
}
HEAVY = {
    "timm",
    "open_clip",
    "transformers",
    "torchvision",
    "pycocoevalcap",
    "matplotlib",
    "accelerate",
    "pyarrow",
    "ray",
}
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}
SCRIPTS = [name for name, source in SOURCES.items() if '__name__ == "__main__"' in source]
ROOT_SCRIPTS = [name for name in SCRIPTS if "." not in name]
# A subpackage may also use the modules directly in captioning/, and its own; `decoder` counts as one.
MAY_IMPORT = {
    "kernels": set(),
    "data": set(),
    "models": {"decoder", "kernels"},
    "inference": {"models", "decoder", "data"},
    "scoring": {"data"},
    "training": {"inference", "data", "models", "scoring", "decoder"},
    "maps": {"inference", "data", "models", "scoring.significance"},
    "scale": {"inference", "data"},
    "report": {"training.run_folder", "models.llava", "maps.attention", "maps.figures", "maps.saved"},
    "app": {"api", "data", "maps", "models", "scoring"},
}
SHARED = {
    "cli": {"profiles"},
    "tensors": {"files", "messages"},
    "checkpoints": {"files", "messages", "torchscript"},
    "clip_names": {"checkpoints", "torchscript"},
    "distributed": {"cli", "device", "imports"},
}
ON_TOP = {"captioning.api"}  # what is called from outside: it may import all, and of the package only the page uses it
DECODER = {"captioning.kernels", "captioning.checkpoints", "captioning.tensors", "captioning.messages"}


def imported(nodes):
    """Names of the modules that import statements below ``nodes`` name, dotted."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def parse(name):
    return ast.parse(SOURCES[name])


def siblings(name):
    return (imported(ast.walk(parse(name))) & MODULES.keys()) - {"bench", "microworld"}


def run_at_import(node):
    """All nodes below ``node`` that run when a module is imported: function bodies do not."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from run_at_import(child)


def unit(name):
    """What the import rules call a module: a subpackage, a module directly in captioning/, or itself."""
    parts = name.split(".")
    return parts[1] if parts[0] == "captioning" and len(parts) > 1 else parts[0]


def within(name, places):
    return any(name == place or name.startswith(f"{place}.") for place in places)


def is_of_a_subpackage(name):
    return name.startswith("captioning.") and unit(name) in MAY_IMPORT


def is_shared(name):
    return name.startswith("captioning.") and unit(name) not in MAY_IMPORT and name not in ON_TOP


def test_the_walk_finds_the_modules_and_their_imports():
    assert {"decoder", "captioning.models.captioner", "p2_train", "evaluate", "microworld.scenes"} <= MODULES.keys()
    assert {"decoder", "captioning.tensors"} <= siblings("captioning.models.captioner")
    assert {"evaluate", "microworld.scenes", "p2_infer", "p2_train"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", [name for name in MODULES if is_of_a_subpackage(name)])
def test_subpackages_import_only_what_they_may(name):
    places = [p if p == "decoder" else f"captioning.{p}" for p in (*MAY_IMPORT[unit(name)], unit(name))]
    strangers = {other for other in siblings(name) if not within(other, places)} - {"captioning"}
    if unit(name) != "kernels":
        strangers = {other for other in strangers if not is_shared(other)}
    assert not strangers


@pytest.mark.parametrize("name", [name for name in MODULES if is_shared(name)])
def test_shared_modules_import_each_other_downwards_only(name):
    assert siblings(name) <= {f"captioning.{other}" for other in SHARED.get(unit(name), ())} | {"captioning"}


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("captioning.") and unit(n) != "app"])
def test_the_package_does_not_import_what_is_called_from_outside(name):
    assert not siblings(name) & ON_TOP - {name}


def test_the_decoder_imports_kernels_and_what_reads_weights():
    assert all(within(other, DECODER | {"captioning"}) for other in siblings("decoder"))


@pytest.mark.parametrize("name", MODULES)
def test_nothing_imports_a_script(name):
    """A script of the micro world or of bench may be used as a library there; the suite's own never are."""
    scripts = set(ROOT_SCRIPTS) if not name.startswith("captioning") else set(SCRIPTS)
    assert not siblings(name) & scripts


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith(("bench", "microworld"))])
def test_the_suite_does_not_depend_on_micro_world_and_benchmarks(name):
    assert not {o for o in siblings(name) if o.startswith(("microworld", "bench"))}


def test_imports_run_in_no_circle():
    graph = {name: siblings(name) - {name} for name in MODULES}
    done, open_ = set(), []

    def visit(name):
        if name not in graph:
            return
        assert name not in open_, " imports ".join([*open_[open_.index(name) :], name])
        if name not in done:
            open_.append(name)
            for other in sorted(graph[name]):
                visit(other)
            done.add(open_.pop())

    for name in graph:
        visit(name)


def test_the_root_shows_what_a_user_runs():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    root = {name.split("/")[0] for name in tracked}
    assert len(root) <= 26 and len([name for name in root if name.endswith(".py")]) <= 9


@pytest.mark.parametrize("name", ["decoder", "captioning.inference.search"])
def test_decoder_and_search_know_no_model_library_and_no_pictures(name):
    top = {module.split(".")[0] for module in imported(ast.walk(parse(name)))}
    assert not top & (HEAVY | {"PIL"})


@pytest.mark.parametrize("name", MODULES)
def test_heavy_packages_are_imported_where_they_are_used(name):
    top = {module.split(".")[0] for module in imported(run_at_import(parse(name)))}
    assert not top & HEAVY


def test_importing_every_module_loads_nothing_heavy_prints_nothing_and_keeps_the_seed():
    """The parse above misses what a package of ours imports in turn; a fresh interpreter does not."""
    code = (
        "import random, sys; state = random.getstate(); import torch; seed = torch.initial_seed()\n"
        f"for name in {sorted(MODULES)}: __import__(name)\n"
        f"heavy = set({sorted(HEAVY)}) & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "assert random.getstate() == state and torch.initial_seed() == seed, 'a module seeds at import'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(["--help"])
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in SCRIPTS if "def build_parser" in SOURCES[name]])
def test_both_spellings_of_every_option_work(name):
    parser = importlib.import_module(name).build_parser()
    positional = [(a.choices or [str(n)])[0] for n, a in enumerate(parser._actions) if not a.option_strings]
    needed = [a for a in parser._actions if a.option_strings and a.required]
    required = [word for a in needed for word in (a.option_strings[0], str((a.choices or ["x"])[0]))]
    if not any("-" in flag[2:] for action in parser._actions for flag in action.option_strings):
        pytest.skip("no option of two words")
    for action in parser._actions:
        for flag in action.option_strings:
            if "-" not in flag[2:]:
                continue
            text = "1,0,1" if flag == "--lora-enable" else str((action.choices or [1])[0])
            value = [] if action.nargs == 0 else [text]
            spellings = [flag, "--" + flag[2:].replace("-", "_")]
            dashed, underscored = (vars(parser.parse_args([*positional, *required, s, *value])) for s in spellings)
            assert dashed == underscored


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_stay_short_enough_to_read(name):
    lengths = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(parse(name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(SOURCES[name].splitlines()) <= 650
    assert not {function: lines for function, lines in lengths.items() if lines > 60}


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_without_a_word_on_what_it_is_for(name):
    assert ast.get_docstring(parse(name))

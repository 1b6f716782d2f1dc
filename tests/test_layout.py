"""The shape of the repository: who may import whom, nothing heavy at import, and command lines that all answer."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("microworld/*.py"), *ROOT.glob("bench/*.py")])
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
ALLOWED = {  # siblings of the modules that others build on; what is not named here is free
    "decoder": set(),
    "search": set(),
    "profiles": set(),
    "runtime": set(),
    "strictjson": set(),
    "checkpoints": {"runtime"},
    "distributed": {"runtime"},
    "trackers": {"runtime"},
    "data": {"distributed", "runtime", "strictjson"},
    "captioner": {"checkpoints", "decoder", "runtime"},
    "packing": {"decoder"},
    "compiling": {"decoder"},
    "ptb": set(),
    "cider": set(),
    "wording": set(),
    "significance": set(),
    "runs": set(),
    "initial": {"captioner"},
    "reporting": {"runtime"},
    "chapters": {"llava", "reporting", "runs"},
    "studychapters": {"chapters", "reporting", "runs"},
    "gallery": set(),
    "annotations": {"strictjson"},
    "cocometrics": {"annotations", "ptb"},
    "clipscore": {"annotations", "profiles", "runtime"},
    "clipcache": {"clipscore", "runtime"},
    "refcache": {"checkpoints", "cider"},
    "evaluate": {
        "annotations",
        "cider",
        "clipcache",
        "clipscore",
        "cocometrics",
        "gallery",
        "profiles",
        "ptb",
        "refcache",
        "runtime",
        "significance",
        "wording",
    },
    "attention": set(),
    "explain": {"attention", "captioner", "data", "generation", "llava", "runtime"},
    "figures": {"attention", "data", "runtime"},
    "grounding": {"attention", "data", "explain", "strictjson"},
    "viewer": {"attention", "data", "figures", "runtime"},
    "generation": {"captioner", "compiling", "data", "decoder", "distributed", "packing", "runtime", "search"},
    "inference": {"data", "engine_ray", "parts", "runtime", "shards", "sidefile"},
    "shards": {"data", "runtime", "strictjson"},
    "parts": {"runtime", "shards", "sidefile", "strictjson"},
    "engine_ray": {"inference", "parts", "runtime", "shards"},
    "sidefile": {"strictjson"},
    "data_prep": {"data", "runtime"},
    "llava": {"runtime"},
    "microworld.things": set(),
    "microworld.captions": {"microworld.scenes"},
    "microworld.scenes": {"runtime", "microworld.captions", "microworld.things"},
}
# Scripts are no libraries otherwise.
MAY_USE_SCRIPTS = {
    name: {"evaluate"} for name in ("training", "scst", "p2_train", "p1_llava_caption", "bench.evaluate")
}
MAY_USE_ALL = {"report"}


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


def test_the_walk_finds_the_modules_and_their_imports():
    assert {"decoder", "captioner", "p2_train", "p2_infer", "evaluate", "microworld.scenes"} <= MODULES.keys()
    assert {"decoder", "runtime"} <= siblings("captioner")
    assert {"evaluate", "microworld.scenes", "p2_infer", "p2_train"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", ALLOWED)
def test_shared_modules_import_only_the_siblings_that_they_may(name):
    assert siblings(name) <= ALLOWED[name]


@pytest.mark.parametrize("name", ["decoder", "search"])
def test_decoder_and_search_know_no_model_library_and_no_pictures(name):
    top = {module.split(".")[0] for module in imported(ast.walk(parse(name)))}
    assert not top & (HEAVY | {"PIL"})


@pytest.mark.parametrize("name", MODULES)
def test_scripts_are_not_imported_by_each_other(name):
    if name not in MAY_USE_ALL:
        worlds = {script for script in SCRIPTS if script.startswith("microworld.")}  # generators, used as libraries
        assert siblings(name) & set(SCRIPTS) <= worlds | MAY_USE_SCRIPTS.get(name, set())


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith(("bench", "microworld"))])
def test_the_suite_does_not_depend_on_the_micro_world(name):
    assert not {sibling for sibling in siblings(name) if sibling.startswith("microworld")} or name in MAY_USE_ALL


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


def test_runtime_does_not_become_utils():
    assert len(SOURCES["runtime"].splitlines()) <= 170


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_without_a_word_on_what_it_is_for(name):
    assert ast.get_docstring(parse(name))

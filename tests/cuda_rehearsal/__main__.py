"""Rehearse the CUDA paths on a CPU build of torch, and print what they would cost beside what budgets.json says.

python tests/cuda_rehearsal                       # all cases
python tests/cuda_rehearsal "train best" --why    # one, with the lines that wait and the kernels by operator
python tests/cuda_rehearsal --write               # put the counts into budgets.json
"""

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUDGETS = HERE / "budgets.json"
COUNTED_WITH = ("torch", "timm", "open_clip_torch", "transformers")  # whose other versions have other kernels
sys.path[:0] = [str(HERE), str(HERE.parents[1])]


def main(argv=None):
    """Run the command line."""
    import cases  # loads torch with the hooks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of: {'; '.join(cases.CASES)} (default: all)")
    parser.add_argument("--why", action="store_true", help="show where the host waits and which operators are counted")
    parser.add_argument("--json", action="store_true", help="print all that is known of the cases as JSON")
    parser.add_argument("--write", action="store_true", help="write the counts to budgets.json")
    args = parser.parse_args(argv)
    if unknown := set(args.cases) - cases.CASES.keys():
        parser.error(f"no such case: {', '.join(sorted(unknown))}; choose from {'; '.join(cases.CASES)}")
    found = {name: cases.run(name) for name in args.cases or cases.CASES}
    if args.json:
        print(json.dumps(found))
        return 0
    table = json.loads(BUDGETS.read_text())
    for name, facts in found.items():
        show(name, facts, table["budgets"].get(name, {}), args.why)
    if args.write:
        budgets = table["budgets"] | {name: facts["counts"] for name, facts in found.items() if not facts["wrong"]}
        table["versions"] = {name: importlib.metadata.version(name).split("+")[0] for name in COUNTED_WITH}
        table["budgets"] = {name: budgets[name] for name in cases.CASES if name in budgets}
        BUDGETS.write_text(json.dumps(table, indent=2) + "\n")
    return int(any(facts["wrong"] for facts in found.values()))


def show(name, facts, budget, why):
    """Print one case."""
    print(f"{name}: {'; '.join(facts['wrong']) or 'no mismatch'}")
    for what, count in facts["counts"].items():
        note = "" if budget.get(what) == count else f"   (budget: {budget.get(what, 'none')})"
        print(f"    {what:24}{count:8,g}{note}")
    if why:
        for title in ("waits", "operators"):
            print(f"  {title}")
            for what, count in facts[title].items():
                print(f"    {count:6}  {what}")


if __name__ == "__main__":
    sys.exit(main())

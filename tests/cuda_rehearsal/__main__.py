"""Rehearse the CUDA paths on a CPU build of torch, and print what they would cost beside what budgets.json says.

python -m tests.cuda_rehearsal                       # all cases
python -m tests.cuda_rehearsal "train best" --why    # one, with the lines that wait and the kernels by operator
python -m tests.cuda_rehearsal --write               # put the counts into budgets.json
"""

import argparse
import json
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUDGETS = HERE / "budgets.json"
COUNTED_WITH = ("torch", "timm", "open_clip_torch", "transformers")  # whose other versions have other kernels


def build_parser():
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.cuda_rehearsal",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="its name, as the table has it (default: all)")
    parser.add_argument("--why", action="store_true", help="show where the host waits and which operators are counted")
    parser.add_argument("--json", action="store_true", help="print all that is known of the cases as JSON")
    parser.add_argument("--write", action="store_true", help="write the counts to budgets.json")
    return parser


def main(argv=None):
    """Run the command line; return 0, or 1 where a case found something wrong."""
    parser = build_parser()
    args = parser.parse_args(argv)
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    import cases  # with it torch, and before torch the hooks

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
        table["versions"] = {name: metadata.version(name).split("+")[0] for name in COUNTED_WITH}
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

"""Caption drawings that no training showed, and your own pictures, with the adapter that ships; show where it looked.

Prints the captions and writes one page, on which a word of a caption shows its map. The captioner knows drawings of
the micro world only: of a photograph it will say something, and hardly ever something true.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from captioning import load
from captioning.cli import PARTIAL, FlagParser, add_common_flags, command, positive_int, setup_logging
from captioning.files import atomic_path
from captioning.maps import viewer
from captioning.messages import naming
from microworld.scenes import make_image

log = logging.getLogger(__name__)

SEED = 1926  # of no split that anything was trained or measured on


def draw_scenes(folder: Path, count: int, seed: int) -> dict[Path, str]:
    """Draw ``count`` scenes into ``folder``; return one person's caption of each file."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for number in range(count):
        image, _, captions = make_image("val", seed, number)
        path = folder / f"scene{number + 1}.png"
        with atomic_path(path) as temporary:
            image.save(temporary, format="PNG")
        found[path] = captions[0].text
    return found


@command
def main(argv: list[str] | None = None) -> int:
    """Caption and explain; return 0, or 3 (``PARTIAL``) where a picture could not be read."""
    parser = FlagParser(prog="python -m microworld.try_it", description=__doc__.split("\n\n")[0])
    parser.add_argument("pictures", type=Path, nargs="*", metavar="PICTURE", help="pictures of your own, shown first")
    parser.add_argument("--out", type=Path, default=Path("demo/try"), help="folder of the page and the drawings")
    parser.add_argument("--count", type=positive_int, default=9, help="how many scenes to draw")
    parser.add_argument("--seed", type=int, default=SEED, help="another seed draws other scenes")
    parser.add_argument("--adapter", default="micro", help="an adapter, a run's folder, or micro: the one that ships")
    add_common_flags(parser, profile=False)
    args = parser.parse_args(argv)
    setup_logging(args.verbose)
    captioner = load(args.adapter, device=args.device)
    scenes, items = draw_scenes(args.out / "scenes", args.count, args.seed), []
    for path in [*args.pictures, *scenes]:
        try:
            items.append(captioner.explain(path, all_maps=True))
        except (ValueError, OSError) as error:
            log.error("not captioned: %s", naming(path, error))
            continue
        print(f"{path.name:<12} {items[-1].caption}")
        if path in scenes:
            print(f"{'':<12} a person: {scenes[path]}")
    page = args.out / "try.html"
    viewer.write(items, page, "What the captioner sees, and which pixels each word looked at")
    print(f"\nmaps of every word, to open in a browser: {page}")
    return PARTIAL if len(items) < len(args.pictures) + len(scenes) else 0


if __name__ == "__main__":
    sys.exit(main())

"""What the page can do, as functions: pictures and settings in, captions, scores and maps out, as plain JSON values."""

from __future__ import annotations

import hashlib
import itertools
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from captioning import api
from captioning.app.scenes import SPLITS, SceneSet, make_scenes
from captioning.data.images import decode_image, load_image
from captioning.data.ranked import Ranked
from captioning.device import pick_device
from captioning.files import data_url
from captioning.maps import viewer
from captioning.maps.figures import MODELS
from captioning.messages import one_line
from captioning.models.adapter import read_adapter
from captioning.models.llava import PROMPTS
from captioning.profiles import PROFILES, ROOT
from captioning.scoring.clipscore import ClipScorer, clipscore

T = TypeVar("T")
PICTURES, SETS, PAGES = 400, 8, 64  # how many are kept; the oldest go
THUMBNAIL, SHOWN = 160, 640  # pixels of a picture's longer side on the page
LIMITS = {"beam_size": 20, "max_new_tokens": 200, "min_new_tokens": 200, "no_repeat_ngram": 20}


class Kept(OrderedDict[str, T]):
    """A dictionary of so many latest entries."""

    def __init__(self, most: int, forget: Callable[[T], object] = lambda value: None) -> None:
        super().__init__()
        self.most, self.forget = most, forget

    def add(self, key: str, value: T) -> None:
        """Put in a value, as the latest one."""
        self[key] = value
        self.move_to_end(key)
        while len(self) > self.most:
            self.forget(self.popitem(last=False)[1])

    def find(self, key: object, what: str) -> T:
        """Return the value of ``key``, which is then the latest; ValueError where it is gone."""
        if not isinstance(key, str) or key not in self:
            raise ValueError(f"this {what} is not kept any more; choose it again")
        self.move_to_end(key)
        return self[key]


@dataclass(frozen=True)
class Picture:
    """A picture to caption: its file, and for a scene its set and key there."""

    path: Path
    scenes: SceneSet | None = None
    key: str = ""

    def forget(self) -> None:
        """Remove the file of a picture that was sent."""
        if self.scenes is None:
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class MapPage:
    """A page of maps, and what more maps for it are made of: model (by name), picture, caption and prompt."""

    html: str
    model: str
    path: Path
    caption: str
    prompt: str


class Studio:
    """Models, pictures and scenes behind the page. Its methods may be called from several threads.

    Args:
        profile: ``micro`` or ``full``.
        adapters: files to caption with, the first by default.
        folder: for pictures and drawings.
        llava: folder or hub id of a LLaVA; None: the profile's.
        device: as ``--device``.
        options: of :func:`captioning.api.load_zero_shot`.
    """

    def __init__(
        self,
        profile: str,
        adapters: list[Path],
        folder: Path,
        llava: str | None = None,
        device: str = "auto",
        **options: Any,
    ) -> None:
        self.profile, self.folder, self.device, self.llava, self.options = profile, folder, device, llava, options
        self.adapters = {short_name(path): path for path in adapters}
        self.pictures: Kept[Picture] = Kept(PICTURES, Picture.forget)
        self.sets: Kept[SceneSet] = Kept(SETS)
        self.pages: Kept[MapPage] = Kept(PAGES)
        self._models: dict[str, api.Model] = {}
        self._scorer: ClipScorer | None = None
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()  # models work for one request at a time

    def describe(self) -> dict[str, Any]:
        """Return what the page offers."""
        defaults = {name: [model.beam_size, model.max_new_tokens] for name, model in _CLASSES.items()}
        return {
            "profile": self.profile,
            "adapters": list(self.adapters),
            "prompts": list(PROMPTS.values()),
            "splits": list(SPLITS if self.profile == "micro" else SPLITS[:1]),
            "defaults": defaults,
            "limits": LIMITS,
        }

    # --- pictures and scenes

    def add_picture(self, name: str, content: bytes) -> dict[str, Any]:
        """Keep a picture that was sent; return it as the page shows it. ValueError where it cannot be read."""
        image = decode_image(content, name)
        digest = hashlib.sha256(content).hexdigest()[:16]
        path = self.folder / "pictures" / digest / (re.sub(r"[^\w .()-]", "_", name).lstrip(". ")[-80:] or "picture")
        key = f"{digest}/{path.name}"
        with self._lock:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            self.pictures.add(key, Picture(path))
        return {"picture": key, "name": path.name, "references": [], "shown": data_url(image, SHOWN)}

    def draw(self, split: str, seed: int) -> dict[str, Any]:
        """Draw, or choose, a set of scenes; return it as the page shows it."""
        with self._lock:
            made = make_scenes(self.profile, self.folder / "scenes", split, seed)
            made = self.sets.get(made.name, made)
            self.sets.add(made.name, made)
            for key, path in made.paths.items():
                self.pictures.add(f"{made.name}/{key}", Picture(path, made, key))
        thumbnails = {key: data_url(load_image(path), THUMBNAIL) for key, path in made.paths.items()}
        said = made.annotations.references
        scenes = [
            {"picture": f"{made.name}/{key}", "name": key, "said": said[key][0], "shown": thumbnails[key]}
            for key in said
        ]
        return {"set": made.name, "scenes": scenes}

    def show(self, picture: object) -> dict[str, Any]:
        """Return a scene as the page shows a picture, with its references."""
        found = self.pictures.find(picture, "picture")
        said = found.scenes.annotations.references[found.key] if found.scenes else []
        return {
            "picture": picture,
            "name": found.path.name,
            "references": said,
            "shown": data_url(load_image(found.path), SHOWN),
        }

    # --- models

    def model(self, name: str, prompt: str = PROMPTS[1]) -> api.Model:
        """Return LLaVA, by ``llava``, asked by ``prompt``, or the captioner of one of ``adapters``.

        It is loaded when first asked for.
        """
        if name not in self._models:
            if name == "llava":
                source = self.llava or self.profile
                self._models[name] = api.load_zero_shot(source, self.device, **self.options)
            elif name in self.adapters:
                self._models[name] = api.load_tuned(self.adapters[name], self.device, profile=self.profile)
            else:
                raise ValueError(f"adapter {name!r}: not one of those that app.py was started with")
        model = self._models[name]
        if isinstance(model, api.LlavaCaptioner):
            model.prompt = api.check_prompt(prompt)
        return model

    @property
    def scorer(self) -> ClipScorer:
        """The profile's CLIP model."""
        if self._scorer is None:
            clip = PROFILES[self.profile]
            self._scorer = ClipScorer(clip.clip_model, clip.clip_weights, pick_device(self.device))
        return self._scorer

    def warm_up(self) -> None:
        """Load what the first caption needs; what fails says so when it is asked for."""
        for load in (lambda: self.model(next(iter(self.adapters))), lambda: self.model("llava"), lambda: self.scorer):
            with self._lock:
                try_to(load)

    def close(self) -> None:
        """Wait until no model works, and let none begin: a thread within torch at the program's end would abort it."""
        self._lock.acquire()

    # --- captions

    def caption(self, picture: object, adapter: object, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return both models' captions of a picture, with scores and maps."""
        models = [(str(adapter), MODELS["p2"]), ("llava", MODELS["p1"])]
        return self._side_by_side(picture, models, settings)

    def compare(self, picture: object, first: object, second: object, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the captions of two adapters, as :meth:`caption`."""
        return self._side_by_side(picture, [(str(name), str(name)) for name in (first, second)], settings)

    def _side_by_side(
        self, picture: object, models: list[tuple[str, str]], settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the answer of each model, given by name and title, or why it has none."""
        with self._lock:
            found, answers = self.pictures.find(picture, "picture"), []
            for name, title in models:
                try:
                    answers.append({"model": title, **self._answer(found, name, title, settings)})
                except (ValueError, OSError) as error:
                    answers.append({"model": title, "error": one_line(str(error), 500)})
        return {"answers": answers}

    def _answer(self, picture: Picture, name: str, title: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return a model's caption of a picture with its scores, and the number of the page of its maps."""
        prompt = str(settings.get("prompt") or PROMPTS[1])
        model, how = self.model(name, prompt), checked(settings, "llava" if name == "llava" else "captioner")
        caption = model.caption(picture.path, n_best=how["beam_size"], **how)
        assert isinstance(caption, Ranked)
        said: dict[str, Any] = {"caption": str(caption), "ranked": caption.as_json(), "maps": None}
        said["clipscore"], said["why"] = self._clipscore(picture.path, caption)
        said["cider"] = picture.scenes.cider(picture.key, caption) if picture.scenes else None
        said["not there"] = picture.scenes.not_there(picture.key, caption) if picture.scenes else None
        if caption.strip():
            said["maps"] = str(next(self._numbers))
            html = viewer.page([model.explain(picture.path, str(caption))], title, model.map_choices())
            self.pages.add(said["maps"], MapPage(html, name, picture.path, str(caption), prompt))
        return said

    def _clipscore(self, path: Path, caption: str) -> tuple[float | None, str]:
        """Return the CLIPScore, or why there is none: at full size CLIP's weights may be missing."""
        try:
            return clipscore(self.scorer, {"": path}, {"": str(caption)})[""], ""
        except (ValueError, OSError) as error:
            return None, one_line(str(error), 500)

    def compare_scenes(
        self, name: object, first: object, second: object, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the captions of a whole set of scenes by two adapters, each with its CIDEr, and their scores."""
        with self._lock:
            scenes = self.sets.find(name, "set of scenes")
            rows: list[dict[str, Any]] = [{"picture": f"{scenes.name}/{key}", "name": key} for key in scenes.paths]
            means = []
            for adapter in (str(first), str(second)):
                captions = self.model(adapter).caption(list(scenes.paths.values()), **checked(settings, "captioner"))
                found = scenes.evaluator.evaluate(dict(zip(scenes.paths, captions, strict=True)), scenes.metrics)
                means.append({"adapter": adapter, "scores": found.means})
                for row, key, caption in zip(rows, scenes.paths, captions, strict=True):
                    row.setdefault("captions", []).append({"caption": caption, "cider": found.per_image["CIDEr"][key]})
        return {"means": means, "rows": rows}

    def page(self, number: str) -> str:
        """Return a page of maps."""
        with self._lock:
            return self.pages.find(number, "page of maps").html

    def map(self, maps: object, method: object, layers: object, heads: object) -> dict[str, Any]:
        """Return more maps of the page number ``maps``; ``layers`` and ``heads`` are "" where the method has none."""
        asked = {"method": method, "layers": layers, "heads": heads}
        with self._lock:
            page = self.pages.find(maps, "page of maps")
            spec: dict[str, Any] = {name: str(value) for name, value in asked.items() if value != ""}
            found = self.model(page.model, page.prompt).explain(page.path, page.caption, **spec)
        return viewer.view(found.word_maps[0])


_CLASSES: dict[str, type[api.Model]] = {"captioner": api.TunedCaptioner, "llava": api.LlavaCaptioner}


def try_to(do: Callable[[], object]) -> None:
    """Call a function whose failure is told later, to whoever needs what it does."""
    try:
        do()
    except (ValueError, OSError):
        return


def checked(settings: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Return one model's settings as arguments of ``api.Model.caption``.

    Raises:
        ValueError: a number that is none, or out of bounds, by its name on the page.
    """
    beams, longest = _CLASSES[model].beam_size, _CLASSES[model].max_new_tokens
    own = settings.get(model, {})
    if not isinstance(own, dict):
        raise ValueError(f"{model}: settings are an object, not {own!r}")
    given = {**settings, **own}
    defaults = {"beam_size": beams, "max_new_tokens": longest, "min_new_tokens": 0, "no_repeat_ngram": 0}
    how: dict[str, Any] = {}
    for name, default in defaults.items():
        value, least = given.get(name, default), int(name in ("beam_size", "max_new_tokens"))
        if type(value) is not int or not least <= value <= LIMITS[name]:
            raise ValueError(f"{name.replace('_', ' ')} {value!r}: a whole number from {least} to {LIMITS[name]}")
        how[name] = value
    if how["min_new_tokens"] > how["max_new_tokens"]:
        raise ValueError(f"min new tokens {how['min_new_tokens']}: is above max new tokens {how['max_new_tokens']}")
    return how


def short_name(path: Path) -> str:
    """Return a path as it is from the working directory or from the repository, whichever it is in."""
    absolute = path.absolute()
    root = next((root for root in (Path.cwd(), ROOT) if absolute.is_relative_to(root)), None)
    return str(absolute.relative_to(root) if root else absolute)


def adapters_beside(profile: str) -> list[Path]:
    """Return the adapters of a profile that lie where the suite writes them: the profile's own, then those of runs.

    Raises:
        FileNotFoundError: there is none.
    """
    own = Path(PROFILES[profile].adapter)
    found = [own, *sorted(Path().glob("runs/*/best.safetensors")), *sorted(Path().glob("demo/*/best.safetensors"))]
    fitting = [path for path in dict.fromkeys(found) if path.is_file() and _fits(path, profile)]
    if not fitting:
        raise FileNotFoundError(f"--adapter {own}: no such file; train one with p2_train.py, or give --profile micro")
    return fitting


def _fits(path: Path, profile: str) -> bool:
    try:
        return api.profile_of(read_adapter(path)[0]) == profile
    except ValueError:
        return False

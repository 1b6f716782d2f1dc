"""A small HTTP server that holds what hw3_download.sh fetches, and misbehaves on demand."""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
import time
import zipfile
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

from captioning.profiles import ROOT

MANIFEST = ROOT / "hw3_download.tsv"


def manifest_rows():
    """The manifest's lines as lists of six fields."""
    lines = MANIFEST.read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines if line and not line.startswith("#")]


def served_path(source, revision):
    """The URL path at which the hub, GitHub or COCO serves a source of the manifest."""
    kind, name = source.split(":", 1)
    if kind == "coco":
        return f"/{name}"
    owner, repository, file = name.split("/", 2)
    resolved = "" if kind == "github" else "resolve/"
    return f"/{owner}/{repository}/{resolved}{revision}/{file}"


class Mirror:
    """Serves ``files`` by path; ``faults[path]`` lists what goes wrong at the next requests for it, in order.

    Faults: ``truncate`` (half of the rest, then the connection closes), ``stall`` (half, then nothing), ``429``
    (Retry-After: 1), any other status as a number, ``no-range`` (ignores the Range header). ``hub_etags`` sends
    checksums as the hub does. ``redirects`` redirects requests for the hub's files to another host, as the hub does:
    the checksum comes with the redirect, and the faults are those of ``/cdn`` plus the path.
    """

    def __init__(self, files, hub_etags=True):
        self.files, self.hub_etags, self.redirects = files, hub_etags, False
        self.faults, self.requests = defaultdict(list), []
        self.released = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.elsewhere = f"http://localhost:{self.server.server_port}"  # the same server, but for curl another host
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def asked(self, path):
        """The Range headers of all requests for ``path`` so far."""
        return [headers.get("Range") for asked, headers, _ in self.requests if asked == path]

    def _handler(self):
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                mirror.answer(self)

        return Handler

    def answer(self, request):
        path = re.sub("^https?://[^/]+", "", request.path)  # a proxy is asked for whole URLs
        self.requests.append((path, dict(request.headers), time.monotonic()))
        fault = self.faults[path].pop(0) if self.faults[path] else None
        body = self.files.get(path.removeprefix("/cdn"))
        if self.redirects and "/resolve/" in path and not path.startswith("/cdn"):
            return self._refuse(request, 302, {"Location": f"{self.elsewhere}/cdn{path}"}, body)
        if str(fault).isdigit() or body is None:
            return self._refuse(request, int(fault or 404))
        start = int(re.match(r"bytes=(\d+)-", request.headers.get("Range") or "bytes=0-").group(1))
        start = 0 if fault == "no-range" else start
        if start and start >= len(body):
            return self._refuse(request, 416, {"Content-Range": f"bytes */{len(body)}"}, body)
        return self._send(request, body, start, fault)

    def _hub_headers(self, body):
        digest = hashlib.sha256(body).hexdigest()
        return {"X-Linked-Etag": f'"{digest}"', "X-Repo-Commit": "0" * 40} if self.hub_etags else {}

    def _refuse(self, request, status, headers=(), body=b""):
        request.send_response(status)
        headers = {**dict(headers), **({"Retry-After": "1"} if status == 429 else {}), "Content-Length": "0"}
        for key, value in {**headers, **(self._hub_headers(body) if body else {})}.items():
            request.send_header(key, value)
        request.end_headers()

    def _send(self, request, body, start, fault):
        rest = body[start:]
        etag = {} if self.redirects else self._hub_headers(body)
        request.send_response(206 if start else 200)
        headers = {"Content-Length": str(len(rest)), "Accept-Ranges": "bytes", **etag}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        for key, value in headers.items():
            request.send_header(key, value)
        request.end_headers()
        request.wfile.write(rest[: len(rest) // 2] if fault in ("truncate", "stall") else rest)
        request.wfile.flush()
        if fault == "stall":
            self.released.wait(30)


def coco_captions(first_id, count):
    """COCO's caption file of ``count`` images; every third image has six captions, the last one only four."""
    ids = range(first_id, first_id + count)
    captions = [
        {"id": image_id * 10 + n, "image_id": image_id, "caption": f"A cat number {n} on\n a mat. "}
        for number, image_id in enumerate(ids)
        for n in range(4 if number == count - 1 else 6 if number % 3 == 0 else 5)
    ]
    images = [
        {"id": i, "file_name": f"{i:012d}.jpg", "width": 16 + i % 5, "height": 12, "coco_url": "http://elsewhere/"}
        for i in ids
    ]
    return {"info": {}, "licenses": [], "images": images, "annotations": captions[::-1]}


def coco_files(train=12, val=14):
    """What COCO's server holds, on a small scale: the zip of annotations and all images."""
    splits = {"train2017": coco_captions(9, train), "val2017": coco_captions(100, val)}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for split, content in splits.items():
            archive.writestr(f"annotations/captions_{split}.json", json.dumps(content))
    files = {"/annotations/annotations_trainval2017.zip": packed.getvalue()}
    for split, content in splits.items():
        for image in content["images"]:
            drawing = io.BytesIO()
            color = (image["id"] % 256, 80, 120)
            Image.new("RGB", (image["width"], image["height"]), color).save(drawing, "JPEG")
            files[f"/{split}/{image['file_name']}"] = drawing.getvalue()
    return files


def write_manifest(path, files):
    """Copy the repository's manifest with the sizes and checksums of what is served; "-" stays "-"."""
    lines = []
    for parts, target, source, revision, _, sha256 in manifest_rows():
        body = files[served_path(source, revision)]
        digest = "-" if sha256 == "-" else hashlib.sha256(body).hexdigest()
        lines.append("\t".join([parts, target, source, revision, str(len(body)), digest]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_course_zip(path):
    """A small hw3_data.zip with the course's layout, wrapped in a folder and littered by macOS."""
    picture = coco_files()["/val2017/000000000100.jpg"]
    with zipfile.ZipFile(path, "w") as archive:
        for split, image_id in (("train", 1), ("val", 2)):
            name = f"{image_id:012d}.jpg"
            annotation = {"id": 1, "image_id": image_id, "caption": "A cat."}
            content = {"images": [{"id": image_id, "file_name": name}], "annotations": [annotation]}
            archive.writestr(f"hw3_data/p2_data/{split}.json", json.dumps(content))
            archive.writestr(f"hw3_data/p2_data/images/{split}/{name}", picture)
        archive.writestr("hw3_data/p3_data/images/1.jpg", picture)
        archive.writestr("__MACOSX/hw3_data/p2_data/._train.json", b"?")

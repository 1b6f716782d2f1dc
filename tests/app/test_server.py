"""HTTP around the studio: who is answered, what is too large, and that the page knows no other place."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest

import app
from captioning.app import server as module
from captioning.app.server import FILES, PAGE, Server
from captioning.profiles import ROOT


def send(server, path, body=None, method=None, **headers):
    """(status, headers, value) of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method or ("GET" if body is None else "POST"), path, body, names)
    answer = connection.getresponse()
    content = answer.read()
    json_answer = answer.headers["Content-Type"].startswith("application/json")
    return answer.status, answer.headers, json.loads(content) if json_answer else content.decode()


def test_it_listens_here_only_unless_told(server):
    assert server.server_address[0] == "127.0.0.1"
    parser = app.build_parser()
    assert parser.get_default("host") == "127.0.0.1" and server.url == f"http://127.0.0.1:{server.server_port}/"


@pytest.mark.parametrize("path", FILES)
def test_the_page_names_no_other_place_and_may_load_none(path, server):
    status, headers, text = send(server, path)
    assert status == 200 and text == (PAGE / FILES[path]).read_text(encoding="utf-8")
    assert not re.search(r"\w+:?//[\w.]|@import|url\((?!data:)", text.replace("data:,", "")), "an address"
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "http" not in policy and "*" not in policy
    assert "unsafe" not in policy and headers["X-Content-Type-Options"] == "nosniff"


def test_the_page_is_told_what_there_is(server, studio):
    _, _, offer = send(server, "/offer")
    assert offer["largest"] == 10**6 and offer["adapters"] == list(studio.adapters) and offer["profile"] == "micro"


def test_a_picture_is_taken_captioned_and_explained(server, studio, png):
    status, _, shown = send(server, "/picture?name=m%C3%BCnchen.png", png)
    assert status == 200 and shown["name"] == "münchen.png"
    question = {"picture": shown["picture"], "adapter": next(iter(studio.adapters)), "settings": {}}
    status, _, found = send(server, "/caption", question)
    assert status == 200 and all(answer["caption"] for answer in found["answers"])
    status, headers, page = send(server, f"/maps/{found['answers'][0]['maps']}")
    assert status == 200 and "m\\u00fcnchen.png" in page and "://" not in page
    assert headers["Content-Security-Policy"] == "frame-ancestors 'self'"


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/picture?name=a.jpg", b"no picture", 400, "a.jpg: the file is of no known image format"),
        ("/picture?name=a.jpg", b"", 400, "a.jpg: the file is empty"),
        ("/picture?name=big.jpg", b"x" * 1_200_000, 413, "big.jpg: 1.2 MB, and 1 MB are taken at most"),
        ("/picture?name=big.jpg", b"x" * 9_000_000, 413, "big.jpg: 9.0 MB, and 1 MB are taken at most"),
        ("/show", {"picture": "gone"}, 400, "this picture is not kept any more"),
        ("/show", {"picture": ["a"]}, 400, "this picture is not kept any more"),
        ("/show", {"picture": "a", "more": 1}, 400, "/show: asks for an object of picture"),
        ("/show", b"[1]", 400, "/show: asks for an object of picture"),
        ("/show", b'{"picture": NaN}', 400, "NaN is not a JSON number"),
        ("/show", b"\xff\xfe", 400, "utf-8"),
        ("/show", b"[" * 100_000, 400, ""),
        ("/caption", {"picture": "a", "adapter": "b", "settings": 3}, 400, "/caption: asks for an object"),
        ("/draw", {"split": "train", "seed": 1}, 400, "split 'train': use one of val, val_novel"),
        ("/page.py", {"x": 1}, 404, "/page.py: no such page"),
    ],
)
def test_what_cannot_be_done_is_one_line(path, body, status, message, server):
    found, _, answer = send(server, path, body)
    assert found == status and message in answer["error"] and "\n" not in answer["error"]


@pytest.mark.parametrize("path", ["/../app.py", "/page.py", "/maps/", "/maps/../x", "/maps/999999", "/%2e%2e/x"])
def test_no_other_file_is_sent(path, server):
    status, _, answer = send(server, path)
    assert status in (400, 404) and "error" in answer


def test_other_web_pages_cannot_use_it(server):
    """By a form or script of theirs (Origin), or under a name of theirs for this machine (Host)."""
    status, _, answer = send(server, "/show", {"picture": "a"}, Origin="http://evil.example")
    assert (status, answer["error"]) == (403, "asked by another web page")
    assert send(server, "/offer", Host="evil.example")[0] == 403
    own = f"http://127.0.0.1:{server.server_port}"
    assert send(server, "/show", {"picture": "a"}, Origin=own)[0] == 400, "the page itself is heard"
    assert send(server, "/offer", Host=f"localhost:{server.server_port}")[0] == 200


def test_a_server_for_others_answers_to_its_other_names(studio):
    with Server(studio, "0.0.0.0") as public:
        assert public.answers_to("my-machine:7860")


def test_a_request_without_a_length_is_refused(server):
    status, _, answer = send(server, "/show", method="POST", Transfer_Encoding="chunked")
    assert status == 411 and "how long" in answer["error"]


def test_a_fault_of_ours_is_said_and_the_server_lives(server, studio, monkeypatch, caplog):
    monkeypatch.setattr(studio, "show", lambda picture: 1 / 0)
    status, _, answer = send(server, "/show", {"picture": "a"})
    assert status == 500 and answer["error"] == "ZeroDivisionError: division by zero" and "/show" in caplog.text
    assert send(server, "/offer")[0] == 200


def test_many_at_once_get_the_answers_of_one_at_a_time(server, studio, scenes):
    names = [scene["picture"] for scene in scenes["scenes"][:4]]
    adapter, found = next(iter(studio.adapters)), {}
    expected = {name: studio.caption(name, adapter, {})["answers"][0]["ranked"] for name in names}

    def ask(name):
        question = {"picture": name, "adapter": adapter, "settings": {}}
        found[name] = send(server, "/caption", question)[2]["answers"][0]["ranked"]

    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


# --- the script -----------------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch):
    """Servers that app.py started; each ends at once, as by Ctrl-C."""
    made = []

    def serve_forever(self):
        made.append((self.url, self.studio, self.largest))
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Server, "serve_forever", serve_forever)
    monkeypatch.setattr("captioning.app.studio.Studio.warm_up", lambda self: None)
    return made


def test_the_script_serves_the_micro_world_where_nothing_else_was_fetched(served, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert app.main(["--port", "0", "--max-upload", "3"]) == 130
    ((url, studio, largest),) = served
    assert studio.profile == "micro" and largest == 3_000_000
    assert capsys.readouterr().out.strip() == f"{url} (micro; Ctrl-C ends it)"
    assert list(studio.adapters) == ["microworld/weights/adapter/adapter.safetensors"]
    assert not studio.folder.exists(), "what was sent is gone"


def test_the_script_takes_runs_and_adapters(served, adapters, unbroken):
    assert app.main(["--port", "0", "--profile", "micro", "--adapter", str(unbroken), str(adapters[1])]) == 130
    assert list(served[0][1].adapters.values()) == [unbroken / "best.safetensors", adapters[1]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--port", "99999"), "--port 99999: must be from 0 to 65535"),
        (("--max-upload", "0"), "--max-upload 0: must be from 1 to 512 megabytes"),
        (("--adapter", "none.safetensors"), "none.safetensors: no such file"),
        (("--profile", "full", "--port", "0"), "runs/best/best.safetensors: no such file; train one"),
        (("--host", "256.0.0.1", "--port", "0"), "--host 256.0.0.1 --port 0: "),
    ],
)
def test_the_script_refuses_in_one_line(flags, message, served, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert app.main([*flags]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in line and not served


def test_a_port_in_use_is_one_line(served, server, capsys):
    assert app.main(["--profile", "micro", "--port", str(server.server_port)]) == 2
    assert f"--port {server.server_port}: Address already in use; name another, or --port 0" in capsys.readouterr().err


def heed_interrupts():
    """As in a terminal: what a shell starts in the background ignores SIGINT, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_the_command_starts_serves_and_ends():
    """As a user has it. Its start takes less than ten seconds of one core, which other programs do not change."""
    command, environment = [sys.executable, "app.py", "--port", "0"], {**os.environ, "OMP_NUM_THREADS": "1"}
    piped = {"stdout": subprocess.PIPE, "text": True, "preexec_fn": heed_interrupts}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **piped) as running:
        line = running.stdout.readline()
        times = Path(f"/proc/{running.pid}/stat")
        if times.is_file():
            user, system = times.read_text().rpartition(")")[2].split()[11:13]
            assert (int(user) + int(system)) / os.sysconf("SC_CLK_TCK") < 10
        port = int(re.match(r"http://127\.0\.0\.1:(\d+)/ ", line)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        connection.request("GET", "/offer")
        assert json.load(connection.getresponse())["adapters"]
        running.send_signal(signal.SIGINT)
        assert running.wait(300) == 130


def test_pages_and_licence_are_package_data():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    data = setuptools["package-data"]
    assert data["captioning.app"] == ["page.*"] and len(list(PAGE.glob("page.*"))) == len(FILES)
    assert all((ROOT / "captioning" / "scoring" / name).is_file() for name in data["captioning.scoring"])

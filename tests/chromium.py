"""A headless Chromium for tests of pages: what they need of the WebDriver protocol, by mouse, touch and keyboard."""

import base64
import contextlib
import json
import re
import shutil
import subprocess
import urllib.request

from PIL import Image

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
ABSENT = "" if CHROMIUM and DRIVER else "needs a browser: apt-get install chromium chromium-driver"
KEYS = {"right": "\ue014", "left": "\ue012", "end": "\ue010", "home": "\ue011", "escape": "\ue00c", "tab": "\ue004"}


class Browser:
    """What these tests need of the WebDriver protocol (https://www.w3.org/TR/webdriver2): too little for a package."""

    def __init__(self, port):
        # Root in a container has no sandbox to give, and /dev/shm is small there.
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        options = {"binary": CHROMIUM, "args": arguments}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        wanted["timeouts"] = {"script": 300_000}  # milliseconds; a busy machine draws late
        self.root = f"http://127.0.0.1:{port}/session"
        self.root += "/" + self.post("", capabilities={"alwaysMatch": wanted})["sessionId"]

    def call(self, method, path, body=None):
        request = urllib.request.Request(self.root + path, body, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the driver is here, not behind a proxy
        with opener.open(request, timeout=300) as answer:
            return json.load(answer)["value"]

    def post(self, path, **body):
        return self.call("POST", path, json.dumps(body).encode())

    def run(self, script, *arguments):
        """The value of the JavaScript expression ``script`` with ``arguments``."""
        return self.post("/execute/sync", script=f"return {script}", args=list(arguments))

    def devtools(self, command, **parameters):
        return self.post("/goog/cdp/execute", cmd=command, params=parameters)

    def open(self, page, width=1200, height=900, dark=False, fragment=""):
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}  # pictures must not catch a transition halfway
        self.devtools("Emulation.setEmulatedMedia", features=[scheme, still])
        self.post("/url", url="about:blank")  # a change of the fragment alone would not load the page again
        self.log()
        self.post("/url", url=page.as_uri() + fragment)

    def log(self):
        """What the page has complained of since the last call: errors, violations of its policy, failed loads."""
        return [entry["message"] for entry in self.post("/se/log", type="browser")]

    def press(self, *names):
        keys = [{"type": kind, "value": KEYS[name]} for name in names for kind in ("keyDown", "keyUp")]
        self.act({"type": "key", "id": "keys", "actions": keys})

    def pointer(self, kind, x, y, *more):
        """Move a pointer of ``kind`` (mouse, touch) to a point of the window and do ``more`` (pointerDown, …)."""
        actions = [{"type": "pointerMove", "x": round(x), "y": round(y)}, *({"type": m, "button": 0} for m in more)]
        self.act({"type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": actions})

    def act(self, source):
        """Do the actions of a keyboard or pointer, and wait until the page has drawn what came of them."""
        self.post("/actions", actions=[source])
        drawn = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done()))"
        self.post("/execute/async", script=drawn, args=[])

    def word(self, item, word):
        """The centre of a word's button, in pixels of the window."""
        script = """(([item, word]) => { const button = document.querySelectorAll("article")[item]
            .querySelectorAll(".words button")[word + 1]; button.scrollIntoView({block: "center"});
            const box = button.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2]; })(arguments)"""
        return self.run(script, item, word)

    def text(self, selector):
        return self.run("document.querySelector(arguments[0]).textContent", selector)

    def choose(self, name, value):
        self.run(
            """(([name, value]) => { const field = document.querySelector(`[name=${name}]`);
            if (field.type === "checkbox") field.checked = value; else field.value = value;
            field.dispatchEvent(new Event("change")); })(arguments)""",
            name,
            value,
        )

    def options(self, name):
        return self.run("[...document.querySelector(`[name=${arguments[0]}]`).options].map(o => o.value)", name)

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))
        return Image.open(path).convert("RGB")


@contextlib.contextmanager
def started():
    """Yield a browser; it ends with the block."""
    command = [DRIVER, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        try:
            port = next(found[1] for text in driver.stdout if (found := re.search(r"successfully on port (\d+)", text)))
            shown = Browser(port)
            try:
                yield shown
            finally:
                shown.call("DELETE", "")
        finally:
            driver.terminate()

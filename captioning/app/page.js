"use strict";
const at = (id) => document.getElementById(id);
const settings = document.querySelector("#settings form"), drawing = at("drawing"), comparing = at("comparing");
let offer, picture = null, scenes = null, waiting = 0;

/** Make an element with attributes and children; text stays text. */
function make(tag, attributes = {}, ...children) {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  return element;
}

/** Ask the server; what it refuses is an Error of one line. */
async function answerTo(path, body) {
  document.body.classList.toggle("busy", ++waiting > 0);
  try {
    const plain = !(body instanceof Blob);
    const options = body === undefined ? {} : {method: "POST", body: plain ? JSON.stringify(body) : body};
    const answer = await fetch(path, options), value = await answer.json();
    if (!answer.ok) throw new Error(value.error);
    return value;
  } catch (error) {
    throw error instanceof TypeError ? new Error("the page's program does not answer; start app.py again") : error;
  } finally {
    document.body.classList.toggle("busy", --waiting > 0);
  }
}

/** Ask the server, and say what it refuses on the page; null then. */
async function ask(path, body) {
  at("error").textContent = "";
  try {
    return await answerTo(path, body);
  } catch (error) {
    at("error").textContent = error.message;
    return null;
  }
}

function open(tab) {
  for (const button of document.querySelectorAll("[role=tab]")) {
    const chosen = button.id === `tab-${tab}`;
    button.setAttribute("aria-selected", chosen);
    button.tabIndex = chosen ? 0 : -1;
    at(button.getAttribute("aria-controls")).hidden = !chosen;
  }
  fitAll();
}

/** Give a frame the height of its page; what is in it may grow with it, up to the width of its column. */
function fit(frame, rounds = 4) {
  const root = frame.contentDocument?.documentElement;
  if (!root || !frame.offsetParent) return;
  frame.style.height = `${root.scrollHeight}px`;
  if (rounds) requestAnimationFrame(() => fit(frame, rounds - 1));
}

function fitAll() {
  document.querySelectorAll("iframe").forEach((frame) => fit(frame));
}

/** Show the answers, and beside each other the pages of their maps. */
function show(answers, cards, maps) {
  cards.replaceChildren(...answers.map(card));
  maps.replaceChildren(...answers.filter((answer) => answer.maps).map((answer) => {
    const frame = make("iframe", {title: `which pixels each word looked at: ${answer.model}`, src: `/maps/${answer.maps}`});
    frame.addEventListener("load", () => {
      frame.contentWindow.supply = ({method, layers, heads}) => answerTo("/map", {maps: answer.maps, method, layers, heads});
      new ResizeObserver(() => requestAnimationFrame(() => fit(frame))).observe(frame.contentDocument.body);
    });
    return frame;
  }));
}

function wait(cards, maps) {
  cards.replaceChildren(make("p", {className: "soft", textContent: "Looking …"}));
  maps.replaceChildren();
}

/** Settings as the server takes them: numbers by name, those of one model in an object of its own. */
function chosen() {
  const found = {captioner: {}, llava: {}, prompt: settings.elements.prompt.value};
  for (const field of settings.querySelectorAll("input")) {
    const [model, name] = field.name.includes(".") ? field.name.split(".") : [null, field.name];
    (model ? found[model] : found)[name] = field.value === "" ? null : Number(field.value);
  }
  return found;
}

const digits = (number) => number?.toFixed(3).replace("-", "−");

function card(answer) {
  const element = make("article", {}, make("h2", {textContent: answer.model}));
  if (answer.error) {
    element.append(make("p", {className: "error", textContent: answer.error}));
    return element;
  }
  const [best, ...others] = answer.ranked, numbers = make("p", {className: "numbers"});
  const values = {confidence: best.score, CLIPScore: answer.clipscore, CIDEr: answer.cider};
  const absent = (answer["not there"] || []).join(", ");  // CHAIR's: named, and not in the picture
  for (const [name, value] of Object.entries(values).map(([name, value]) => [name, digits(value)])) {
    if (value !== undefined) numbers.append(make("span", {}, `${name} `, make("b", {textContent: value})));
  }
  if (absent) numbers.append(make("span", {}, "not there ", make("b", {textContent: absent})));
  element.append(make("p", {className: "text", textContent: answer.caption || "(nothing)"}), numbers);
  if (answer.why) element.append(make("p", {className: "soft", textContent: `no CLIPScore: ${answer.why}`}));
  if (others.length) {
    const rows = others.map((other) => make("tr", {}, make("td", {textContent: other.caption}),
      make("td", {className: "number", textContent: digits(other.score)})));
    element.append(make("details", {}, make("summary", {textContent: `the other ${others.length} beams`}),
      make("table", {}, make("tbody", {}, ...rows))));
  }
  return element;
}

/** Show a picture that the server keeps, and caption it. */
function take(shown) {
  if (!shown) return;
  picture = shown.picture;
  at("picture").hidden = false;
  Object.assign(at("picture"), {src: shown.shown, alt: shown.name});
  at("hint").textContent = shown.name;
  at("references").textContent = shown.references.length ? `People said: ${shown.references.join(" · ")}` : "";
  for (const button of document.querySelectorAll("[data-picture]")) {
    button.setAttribute("aria-current", button.dataset.picture === picture);
  }
  return caption();
}

async function caption() {
  if (picture === null) return;
  const asked = picture;
  wait(at("answers"), at("maps"));
  const found = await ask("/caption", {picture, adapter: settings.elements.adapter.value, settings: chosen()});
  if (asked !== picture) return; // another one has been chosen meanwhile
  show(found?.answers ?? [], at("answers"), at("maps"));
}

async function send(file) {
  if (!file) return;
  if (file.size > offer.largest) {
    const [has, most] = [file.size, offer.largest].map((bytes) => (bytes / 1e6).toFixed(1));
    at("error").textContent = `${file.name}: ${has} MB, and ${most} MB are taken at most; scale it down`;
    return;
  }
  await take(await ask(`/picture?name=${encodeURIComponent(file.name)}`, file));
}

function sceneButton(scene, withText) {
  const button = make("button", {type: "button", title: scene.said}, make("img", {src: scene.shown, alt: scene.said}));
  button.dataset.picture = scene.picture;
  if (withText) button.append(make("span", {textContent: scene.said}));
  button.addEventListener("click", async () => {
    open("caption");
    await take(await ask("/show", {picture: scene.picture}));
  });
  return button;
}

async function draw() {
  const found = await ask("/draw", {split: drawing.elements.split.value, seed: Number(drawing.elements.seed.value)});
  if (!found) return;
  scenes = found;
  at("strip").replaceChildren(...scenes.scenes.map((scene) => sceneButton(scene, false)));
  at("grid").replaceChildren(...scenes.scenes.map((scene) => sceneButton(scene, true)));
  at("about").textContent = `${scenes.scenes.length} scenes, each with one of its captions by people. ` +
    "CIDEr counts how rare words are among the references of these.";
}

async function compare(what) {
  const {first, second} = comparing.elements, both = {first: first.value, second: second.value, settings: chosen()};
  if (what === "picture" && picture === null) {
    at("error").textContent = "no picture is chosen; take one under Caption or Scenes";
    return;
  }
  wait(at("compared"), at("compared-maps"));
  if (what === "picture") {
    const found = await ask("/compare", {picture, ...both});
    show(found?.answers ?? [], at("compared"), at("compared-maps"));
    return;
  }
  const found = scenes && await ask("/compare-scenes", {set: scenes.set, ...both});
  at("compared").replaceChildren(...(found ? [tableOf(found)] : []));
}

function tableOf(found) {
  const thumbs = Object.fromEntries(scenes.scenes.map((scene) => [scene.picture, scene.shown]));
  const heads = found.means.map((mean) => make("th", {}, mean.adapter, make("div", {className: "soft",
    textContent: Object.entries(mean.scores).map(([name, value]) => `${name} ${digits(value)}`).join(" · ")})));
  const rows = found.rows.map((row) => make("tr", {}, make("td", {}, make("img", {src: thumbs[row.picture] ?? "", alt: row.name, width: 64})),
    ...row.captions.map((said) => make("td", {}, said.caption, make("div", {className: "soft", textContent: said.cider.toFixed(3)})))));
  return make("table", {}, make("thead", {}, make("tr", {}, make("th", {}), ...heads)), make("tbody", {}, ...rows));
}

function listen() {
  for (const button of document.querySelectorAll("[role=tab]")) {
    button.addEventListener("click", () => open(button.id.slice(4)));
    button.addEventListener("keydown", (event) => {
      const step = {ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling"}[event.key];
      const next = step && button[step];
      if (next) { open(next.id.slice(4)); next.focus(); }
    });
  }
  addEventListener("resize", fitAll);
  at("file").addEventListener("change", (event) => send(event.target.files[0]).then(() => { event.target.value = ""; }));
  const drop = at("drop");
  for (const kind of ["dragenter", "dragover"]) {
    drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
  }
  for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => { event.preventDefault(); send(event.dataTransfer.files[0]); });
  at("again").addEventListener("click", caption);
  at("prompts").addEventListener("change", (event) => { settings.elements.prompt.value = event.target.value; });
  for (const form of [settings, drawing, comparing]) form.addEventListener("submit", (event) => event.preventDefault());
  drawing.addEventListener("submit", draw);
  at("other").addEventListener("click", () => {
    drawing.elements.seed.value = Math.floor(Math.random() * 2 ** 31);
    draw();
  });
  comparing.addEventListener("submit", (event) => compare(event.submitter?.value ?? "picture"));
}

async function start() {
  listen();
  offer = await ask("/offer");
  if (!offer) return;
  const micro = offer.profile === "micro";
  at("profile").textContent = (micro ? "The micro world: small models that know drawings only, nothing of photographs. " :
    "Full size. ") + `Pictures up to ${offer.largest / 1e6} MB.`;
  const fill = (select, values) => select.replaceChildren(...values.map((value) => new Option(value, value)));
  for (const select of [settings.elements.adapter, comparing.elements.first, comparing.elements.second]) fill(select, offer.adapters);
  comparing.elements.second.selectedIndex = Math.min(1, offer.adapters.length - 1);
  fill(drawing.elements.split, offer.splits);
  fill(at("prompts"), offer.prompts);
  settings.elements.prompt.value = offer.prompts[0];
  for (const [model, [beams, longest]] of Object.entries(offer.defaults)) {
    settings.elements[`${model}.beam_size`].value = beams;
    settings.elements[`${model}.max_new_tokens`].value = longest;
  }
  for (const field of settings.querySelectorAll("input")) field.max = offer.limits[field.name.split(".").pop()];
  open("caption");
  await draw();
}

start();

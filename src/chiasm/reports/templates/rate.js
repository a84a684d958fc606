// One rater answers for one image after another; what was said is kept in the browser after every key.
"use strict";
const byId = id => document.getElementById(id);
const { study, images } = JSON.parse(byId("study").textContent);
const COLUMNS = ["study", "rater", "token", "answer", "quality", "seconds"];
const KEY = `chiasm-rate-${study}`;

let rater = "", at = 0, answers = {}; // token -> { answer, quality, seconds }
let since = null; // when the clock of the image on the screen was last read; null while nobody looks

function read(key) {
  try { return localStorage.getItem(key); } catch { return null; }
}

function write(key, value) {
  try {
    localStorage.setItem(key, value);
  } catch {
    byId("trouble").textContent = "This browser does not keep your answers: download them before you close or reload this page.";
    byId("trouble").hidden = false;
  }
}

function keep() {
  write(`${KEY}-${rater}`, JSON.stringify({ at, answers }));
}

const of = token => answers[token] ??= { answer: "", quality: "", seconds: 0 };
const isDone = token => Boolean(answers[token]?.answer && answers[token]?.quality);
const done = () => images.filter(({ token }) => isDone(token)).length;

function readClock() { // an image's time is what passes until both answers are given, while the page is in view
  const now = performance.now(), { token } = images[at];
  if (since !== null && !isDone(token)) of(token).seconds += (now - since) / 1000;
  since = document.hidden || byId("desk").hidden ? null : now;
}

function show(said = "") {
  const { token, image, size } = images[at], { answer, quality } = of(token);
  byId("image").src = image;
  byId("image").style.setProperty("--ratio", size[0] / size[1]); // in mm: voxels need not be square
  byId("image").alt = `Image ${at + 1} of ${images.length}`;
  for (const button of document.querySelectorAll("[data-answer]")) button.setAttribute("aria-pressed", button.dataset.answer === answer);
  for (const button of document.querySelectorAll("[data-quality]")) button.setAttribute("aria-pressed", button.dataset.quality === String(quality));
  byId("before").disabled = at === 0;
  byId("after").disabled = at === images.length - 1;
  byId("open").disabled = done() === images.length;
  byId("progress").textContent = `Image ${at + 1} of ${images.length}, ${done()} answered`;
  byId("bar").value = done();
  byId("said").textContent = said || (done() === images.length ? "All images are answered: download the file." : "");
}

function go(to) {
  if (to < 0 || to >= images.length) return;
  readClock();
  at = to;
  const { answer, quality } = of(images[at].token);
  show(`Image ${at + 1}${answer ? `, ${answer}` : ""}${quality ? `, quality ${quality}` : ""}.`);
  keep();
}

function say(name, value) {
  readClock();
  of(images[at].token)[name] = value;
  const all = done() === images.length ? " All images are answered: download the file." : "";
  show(`${name === "quality" ? "Quality " : ""}${value}.${all}`);
  keep();
}

function goToOpen() {
  for (let step = 1; step <= images.length; step++) {
    const to = (at + step) % images.length;
    if (!isDone(images[to].token)) return go(to);
  }
}

function clean(name) { // what a table and a file's name can hold
  return name.normalize("NFC").replace(/[^\p{L}\p{N} ._-]/gu, "").replace(/^[^\p{L}\p{N}]+/u, "").trim();
}

function start(name) {
  rater = clean(name);
  byId("who").hidden = Boolean(rater);
  byId("desk").hidden = !rater;
  if (!rater) return byId("rater").focus();
  const kept = JSON.parse(read(`${KEY}-${rater}`) ?? "{}");
  answers = kept.answers ?? {};
  at = Math.min(kept.at ?? 0, images.length - 1);
  write(KEY, rater);
  since = null;
  readClock();
  show();
  byId("desk").focus(); // else the field of the name, which is hidden now, would swallow the first key
}

function leave() {
  readClock();
  keep();
  write(KEY, "");
  byId("rater").value = "";
  start("");
}

function table() {
  const rows = images.map(({ token }) => {
    const { answer, quality, seconds } = of(token);
    return [study, rater, token, answer, quality, seconds ? seconds.toFixed(1) : ""];
  });
  return [COLUMNS, ...rows].map(row => row.join(",")).join("\n") + "\n";
}

function download() {
  readClock();
  keep();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([table()], { type: "text/csv" }));
  link.download = `ratings-${rater.replaceAll(" ", "-")}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  const left = images.length - done();
  byId("said").textContent = left ? `Downloaded. ${left} images are not answered yet.` : "Downloaded. Every image is answered.";
}

function press(event) {
  if (byId("desk").hidden || event.target.matches("input") || event.ctrlKey || event.metaKey || event.altKey) return;
  const actions = {
    r: () => say("answer", "real"), s: () => say("answer", "synthetic"), n: goToOpen,
    ArrowLeft: () => go(at - 1), ArrowRight: () => go(at + 1),
  };
  const action = /^[1-5]$/.test(event.key) ? () => say("quality", Number(event.key)) : actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  action();
  event.preventDefault();
}

for (const button of document.querySelectorAll("[data-answer]")) button.addEventListener("click", () => say("answer", button.dataset.answer));
for (const button of document.querySelectorAll("[data-quality]")) button.addEventListener("click", () => say("quality", Number(button.dataset.quality)));
byId("before").addEventListener("click", () => go(at - 1));
byId("after").addEventListener("click", () => go(at + 1));
byId("open").addEventListener("click", goToOpen);
byId("save").addEventListener("click", download);
byId("change").addEventListener("click", leave);
byId("who").addEventListener("submit", event => {
  event.preventDefault();
  start(byId("rater").value);
});
document.addEventListener("keydown", press);
document.addEventListener("visibilitychange", readClock);
window.addEventListener("pagehide", () => { if (rater) { readClock(); keep(); } });
byId("image").addEventListener("contextmenu", event => event.preventDefault());
start(read(KEY) ?? "");

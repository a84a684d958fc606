// The page of a server: files go in by its REST API, and what comes back is shown.
"use strict";
const byId = id => document.getElementById(id);
const SOURCES = [...document.querySelectorAll("[data-way=files] .drop")].map(drop => drop.dataset.field);
const NOTHING = byId("nothing").textContent;
const SOON = 700; // milliseconds between two looks at a job
const ENDING = /(\.nii)?\.\w+$/i; // of the name of a volume or an archive
const KEPT = `jobs ${location.pathname}`; // below paths of one name lie pages of several servers
const jobs = new Map(); // id -> { names, item }, of this window; only the page knows the names of the user's files
let shown = null;
if (!location.pathname.endsWith("/")) { // the page's addresses begin below it
  const below = new URL(location.href); // not of the path alone: one that begins with // would name another server
  below.pathname += "/";
  location.replace(below);
}

function headers() {
  const token = byId("token")?.value;
  return token ? { Authorization: `Bearer ${token}` } : {};
}

function sentence({ message, hint }) {
  return hint ? `${message} ${hint}` : message;
}

// An answer that is no JSON: another program between this page and the server made it
function unread(status) {
  if (status === 413) return "A proxy before the server answered 413: it takes no request as large as this (nginx: client_max_body_size).";
  if (status === 502 || status === 504) return `A proxy before the server answered ${status}: it does not reach the server, or waits no longer for it.`;
  return `The server answered ${status}.`;
}

async function problemOf(answer) {
  try {
    return sentence(await answer.json());
  } catch {
    return unread(answer.status);
  }
}

function refuse(text) {
  byId("refused").textContent = text;
  byId("refused").hidden = !text;
}

// Files that are chosen or dropped

function size(bytes) {
  return bytes < 2 ** 20 ? `${Math.ceil(bytes / 1024)} KiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`;
}

function choose(drop) {
  const [file] = drop.querySelector("input[type=file]").files;
  drop.classList.toggle("full", Boolean(file));
  drop.querySelector(".chosen").textContent = file ? `${file.name}, ${size(file.size)}` : "Drop a file here, or choose one";
}

for (const drop of document.querySelectorAll(".drop")) {
  const input = drop.querySelector("input[type=file]");
  input.addEventListener("change", () => choose(drop));
  for (const kind of ["dragenter", "dragover"]) drop.addEventListener(kind, event => {
    event.preventDefault();
    drop.classList.add("over");
  });
  for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.classList.remove("over"));
  drop.addEventListener("drop", event => {
    event.preventDefault();
    if (!event.dataTransfer.files.length) return;
    input.files = event.dataTransfer.files;
    choose(drop);
  });
}

for (const way of document.querySelectorAll("[name=way]")) way.addEventListener("change", () => {
  for (const part of document.querySelectorAll("[data-way]")) part.hidden = part.dataset.way !== way.value;
});

// A rule for one source; whoever writes "t1=2" as a program does means the same
function ruleOf({ dataset: { series }, value }) {
  const words = value.trim();
  return words.startsWith(`${series}=`) ? words : `${series}=${words}`;
}

function handed() {
  const form = new FormData(), names = [];
  for (const drop of document.querySelectorAll("[data-way]:not([hidden]) .drop")) {
    const [file] = drop.querySelector("input[type=file]").files;
    if (!file) throw new Error(`A file is missing: ${drop.dataset.field}.`);
    form.append(drop.dataset.field, file);
    names.push(file.name);
    for (const input of drop.querySelectorAll("[data-series]")) if (input.value.trim()) form.append("series", ruleOf(input));
  }
  return { form, names };
}

// fetch cannot say how much was sent, so this is an older kind of request
function post(form) {
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest();
    request.open("POST", "api/jobs");
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = ({ loaded, total }) => byId("sending").textContent = `Sending: ${Math.round(100 * loaded / total)} %`;
    request.onerror = () => failed(new Error("The server cannot be reached."));
    request.onload = () => {
      let answer = {};
      try {
        answer = JSON.parse(request.responseText);
      } catch {
        answer.message = unread(request.status);
      }
      if (request.status === 202) done(answer);
      else failed(new Error(sentence(answer)));
    };
    request.send(form);
  });
}

byId("form").addEventListener("submit", async event => {
  event.preventDefault();
  refuse("");
  byId("send").disabled = true;
  try {
    const { form, names } = handed();
    const job = await post(form);
    add(job.id, names);
    update(job);
  } catch (error) {
    refuse(error.message);
  }
  byId("sending").textContent = "";
  byId("send").disabled = false;
});

// Jobs

function add(id, names) {
  const item = document.createElement("li");
  item.innerHTML = '<h3></h3><p class="where"></p><progress max="1" value="0"></progress><ul class="notes"></ul><div class="does"></div>';
  item.dataset.job = id;
  item.querySelector("h3").textContent = names.join(" + ");
  jobs.set(id, { names, item });
  byId("list").prepend(item);
  byId("none").hidden = true;
  remember();
}

function remember() {
  sessionStorage.setItem(KEPT, JSON.stringify([...jobs].map(([id, { names }]) => [id, names])));
}

function where(job) {
  if (job.state === "waiting") return job.jobs_before ? `Waiting: ${job.jobs_before} before it, about ${Math.round(job.expected_s)} s` : "Waiting";
  if (job.state === "running") return `${job.stage[0].toUpperCase()}${job.stage.slice(1)}: ${Math.round(100 * job.progress)} %`;
  if (job.state === "done") return `Done in ${job.seconds.toFixed(1)} s; kept for ${Math.ceil(job.expires_s / 60)} min.`;
  return sentence(job.error ?? { message: "It failed." });
}

function button(text, does) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", does);
  return made;
}

function update(job) {
  const { item } = jobs.get(job.id);
  const isOver = job.state === "done" || job.state === "failed";
  item.dataset.state = job.state;
  item.querySelector(".where").textContent = where({ ...job, stage: job.stage || "working" });
  item.querySelector(".where").classList.toggle("problem", job.state === "failed");
  item.querySelector("progress").hidden = isOver;
  item.querySelector("progress").value = job.progress;
  item.querySelector(".notes").replaceChildren(...job.warnings.map(text => Object.assign(document.createElement("li"), { textContent: text })));
  const downloads = job.files.map(file => button(`Download: ${file.title}`, () => download(job.id, file)));
  const look = job.state === "done" ? SOURCES.map(source => button(SOURCES.length > 1 ? `Look at it beside ${source}` : "Look at it", () => show(job.id, source))) : [];
  item.querySelector(".does").replaceChildren(...look, ...downloads, button("Delete", () => remove(job.id)));
  if (!isOver) setTimeout(() => ask(job.id), SOON);
  else if (job.state === "done" && shown === null) show(job.id, SOURCES[0]);
}

async function ask(id) {
  if (!jobs.has(id)) return;
  let answer;
  try {
    answer = await fetch(`api/jobs/${id}`, { headers: headers() });
  } catch {
    jobs.get(id).item.querySelector(".where").textContent = "The server cannot be reached; trying again.";
    setTimeout(() => ask(id), 5 * SOON);
    return;
  }
  if (!jobs.has(id)) return;
  if (answer.ok) update(await answer.json());
  else if (answer.status === 404) lose(id);
  else refuse(await problemOf(answer));
}

function lose(id) {
  refuse(`${jobs.get(id).names.join(" + ")}: the server no longer has this job. It was kept too long, or the server was started again: hand the scan in again.`);
  forget(id);
}

function forget(id) {
  jobs.get(id)?.item.remove();
  jobs.delete(id);
  byId("none").hidden = jobs.size > 0;
  if (shown === id) unshow();
  remember();
}

async function remove(id) {
  const answer = await fetch(`api/jobs/${id}`, { method: "DELETE", headers: headers() });
  if (answer.ok || answer.status === 404) forget(id);
  else refuse(await problemOf(answer));
}

async function blob(address) {
  const answer = await fetch(address, { headers: headers() });
  if (!answer.ok) throw new Error(await problemOf(answer));
  return answer.blob();
}

// The server calls each patient's files alike
function savedAs(id, name) {
  return `${jobs.get(id).names[0].replace(ENDING, "")}_${name.replace(/^scan_/, "")}`;
}

async function download(id, { name, address }) {
  try {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await blob(address.replace(/^\//, "")));
    link.download = savedAs(id, name);
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  } catch (error) {
    refuse(error.message);
  }
}

function unshow() {
  shown = null;
  URL.revokeObjectURL(byId("view").src);
  byId("view").removeAttribute("src");
  byId("view").hidden = true;
  byId("nothing").textContent = NOTHING;
  byId("nothing").hidden = false;
  byId("whose").textContent = "";
}

async function show(id, source) {
  shown = id;
  byId("nothing").textContent = "The result is being drawn …";
  try {
    const page = await blob(`api/jobs/${id}/view?source=${source}`);
    if (shown !== id) return;
    URL.revokeObjectURL(byId("view").src);
    byId("view").src = URL.createObjectURL(page);
    byId("view").hidden = false;
    byId("nothing").hidden = true;
    byId("whose").textContent = `: ${jobs.get(id).names.join(" + ")}`;
    byId("result").scrollIntoView();
  } catch (error) {
    unshow();
    refuse(error.message);
  }
}

for (const place of document.querySelectorAll(".origin")) place.textContent = new URL(".", location.href).href.replace(/\/$/, "");
for (const [id, names] of JSON.parse(sessionStorage.getItem(KEPT) ?? "[]")) {
  add(id, [names].flat());
  ask(id);
}
byId("token")?.addEventListener("change", () => { // after a reload, nothing could be asked without it
  refuse("");
  for (const [id, { item }] of jobs) if (!item.dataset.state) ask(id);
});

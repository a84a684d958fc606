// Panes of one case: each is a NiiVue of its own, all show the same voxel. Needs panes.js.
const settings = JSON.parse(byId("settings").textContent);
const unit = settings.unit ? ` ${settings.unit}` : "";
const LESION = { R: [0, 255], G: [0, 210], B: [0, 63], A: [0, 255], I: [0, 1], labels: ["", "lesion"] };

const panes = {}; // name -> NiiVue
const values = {}; // name -> voxels as they stand in the page, never swapped
const MAPS = ["difference", "expected_error", "spread"]; // drawn in colours, and only inside the mask
let regions, dims, voxel, radiological = true, plane = "axial", zoom = 1, swapped = false, timer = 0;

function show(place) {
  voxel = place.map((at, axis) => Math.min(Math.max(Math.round(at), 0), dims[axis] - 1));
  const index = voxel[0] + dims[0] * (voxel[1] + dims[1] * voxel[2]);
  const inside = regions[index] & 1;
  for (const name in panes) {
    const bare = MAPS.includes(name);
    const step = settings.steps[name] ?? settings.steps.synthetic;
    const value = values[name][index] * step;
    const sign = name === "difference" && value > 0 ? "+" : "";
    const text = bare && !inside ? "–" : `${sign}${digits(value, step)}${name === "source" && unit !== " HU" ? "" : unit}`;
    byId(`value-${name}`).textContent = text;
    document.querySelector(`[data-pane=${name}] output`).textContent = text;
  }
  byId("region").textContent = regions[index] & 2 ? "in a labelled lesion" : inside ? "in the mask" : "outside the mask";
  const first = Object.values(panes)[0];
  const mm = first.frac2mm(first.vox2frac(voxel), 0, true);
  showWorld(mm);
}

function moveTo(place) {
  show(place);
  for (const pane of Object.values(panes)) {
    pane.scene.crosshairPos = pane.vox2frac(voxel);
    pane.drawScene();
  }
}

function setWindow(low, high) {
  if (!(low < high)) return;
  for (const name of ["real", "synthetic"].filter(name => panes[name])) {
    const image = panes[name].volumes[0];
    if (image.cal_min !== low || image.cal_max !== high) {
      [image.cal_min, image.cal_max] = [low, high];
      panes[name].updateGLVolume();
    }
    document.querySelector(`[data-pane=${name}] .scale`).textContent = `${label(low, high)}${unit}`;
  }
  const step = (high - low) / 1000;
  byId("level").value = Number(((low + high) / 2).toFixed(Math.max(0, Math.ceil(-Math.log10(step)))));
  byId("width").value = Number((high - low).toFixed(Math.max(0, Math.ceil(-Math.log10(step)))));
}

function setPlane(name) {
  plane = name;
  showPlane(Object.values(panes), name);
}

function setZoom(factor) {
  zoom = Math.min(8, Math.max(1, zoom * factor));
  for (const pane of Object.values(panes)) zoomIn(pane, zoom);
}

function swap() {
  if (!panes.real) return;
  swapped = !swapped;
  const image = panes.synthetic.volumes[0];
  image.img = swapped ? values.real : values.synthetic;
  panes.synthetic.updateGLVolume();
  const pane = document.querySelector("[data-pane=synthetic]");
  pane.classList.toggle("swapped", swapped);
  pane.querySelector("strong").textContent = settings.names[swapped ? "real" : "synthetic"];
}

function flicker() {
  const going = byId("flicker").getAttribute("aria-pressed") !== "true";
  byId("flicker").setAttribute("aria-pressed", going);
  clearInterval(timer);
  if (going) timer = setInterval(swap, 700);
  else if (swapped) swap();
}

function toggle(button, change) {
  if (!button) return;
  const on = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", on);
  change(on);
}

function outline(on) {
  for (const pane of Object.values(panes)) {
    pane.drawRimOpacity = on ? 1 : 0;
    pane.drawOpacity = on ? 0.004 : 0; // the rim is drawn only where the inside is not fully clear
    pane.drawScene();
  }
}

function turn(on) {
  radiological = on;
  for (const pane of Object.values(panes)) pane.setRadiologicalConvention(on);
}

function press(event) {
  if (event.target.matches("input, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  const { across, up, through } = waysOf(plane, radiological);
  const step = (way, sign) => moveTo(voxel.map((at, axis) => at + sign * way[axis]));
  const onPane = event.target.matches("canvas, body");
  const actions = {
    a: () => setPlane("axial"), c: () => setPlane("coronal"), s: () => setPlane("sagittal"), m: () => setPlane("three"),
    f: swap, l: () => toggle(byId("outline"), outline), r: () => toggle(byId("radiological"), turn), w: () => setWindow(...settings.window),
    "+": () => setZoom(1.25), "=": () => setZoom(1.25), "-": () => setZoom(0.8),
    ...(event.target.matches("canvas") ? {
      ArrowLeft: () => step(across, -1), ArrowRight: () => step(across, 1), ArrowUp: () => step(up, 1), ArrowDown: () => step(up, -1),
      PageUp: () => step(through, 1), PageDown: () => step(through, -1),
    } : {}),
  };
  const jump = onPane && /^[1-9]$/.test(event.key) && settings.jumps[event.key - 1];
  const action = jump ? () => moveTo(jump.voxel) : actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  action();
  event.preventDefault();
  event.stopPropagation(); // NiiVue's own keys would move once more
}

function whole(bytes) { // all low bytes of the values stand before all high ones, which compresses better
  const start = 352;
  const bits = new DataView(bytes.buffer).getInt16(72, true);
  if (bits !== 16) return bytes;
  const count = (bytes.length - start) / 2;
  const file = new Uint8Array(bytes.length);
  file.set(bytes.subarray(0, start));
  for (let index = 0; index < count; index++) {
    file[start + 2 * index] = bytes[start + index];
    file[start + 2 * index + 1] = bytes[start + count + index];
  }
  return file;
}

function subtract(real, synthetic) {
  const difference = synthetic.clone();
  difference.name = "difference.nii";
  difference.img = values.synthetic.map((value, index) => {
    const change = regions[index] & 1 ? value - values.real[index] : 0;
    return Math.min(32767, Math.max(-32768, change));
  });
  return difference;
}

function look(name, image) {
  const scale = document.querySelector(`[data-pane=${name}] .scale`);
  if (MAPS.includes(name)) {
    const range = name === "spread" ? settings.spreadRange : settings.range;
    image.colormap = name === "difference" ? "change" : "expected"; // first, for this sets a range of its own
    [image.cal_min, image.cal_max] = [name === "difference" ? -range : 0, range];
    const most = digits(range, range / 50);
    showRamp(scale, image.colormap, name === "difference" ? `−${most}` : "0", `${name === "difference" ? "+" : ""}${most}${unit}`);
  } else {
    [image.cal_min, image.cal_max] = name === "source" ? settings.sourceWindow : settings.window;
    if (name === "source") scale.textContent = label(...settings.sourceWindow);
  }
}

async function start() {
  byId("viewer").hidden = false;
  const began = performance.now();
  await painted();
  await unpack();
  const images = {};
  for (const name of Object.keys(settings.names).filter(name => name !== "difference")) {
    images[name] = await load(name, whole);
    values[name] = images[name].img;
  }
  regions = (await load("regions", whole)).img;
  dims = images.source.dimsRAS.slice(1, 4);
  if (images.real) {
    images.difference = subtract(images.real, images.synthetic);
    values.difference = images.difference.img;
  }
  for (const name of ["expected_error", "spread"])
    if (images[name]) images[name].img = values[name].map((value, index) => regions[index] & 1 ? value : 0);
  const lesion = settings.hasLesion ? Uint8Array.from(regions, bits => bits >> 1) : null;
  for (const name of Object.keys(settings.names)) {
    const grey = !MAPS.includes(name);
    const pane = makePane(grey);
    await pane.attachToCanvas(byId(`pane-${name}`));
    if (lesion) pane.setDrawColormap(LESION); // before the volume, which would be drawn again
    look(name, images[name]);
    pane.addVolume(images[name]);
    if (lesion) {
      pane.createEmptyDrawing();
      pane.drawBitmap.set(lesion);
      pane.drawOpacity = 0.004;
      pane.drawRimOpacity = 1;
      pane.refreshDrawing(true);
    }
    pane.onLocationChange = place => { if (place.vox && pane.canvas.matches(":focus")) show(place.vox); };
    panes[name] = pane;
    loaded(name);
  }
  const all = Object.values(panes);
  for (const pane of all) {
    pane.broadcastTo(all.filter(other => other !== pane), { "2d": true, "3d": true });
    // NiiVue moves the others only where its canvas has the focus, which a click gives too late
    pane.canvas.addEventListener("pointerdown", () => pane.canvas.focus({ preventScroll: true }));
    pane.canvas.addEventListener("mouseup", () => {
      const { cal_min: low, cal_max: high } = pane.volumes[0];
      if (pane === panes.source) document.querySelector("[data-pane=source] .scale").textContent = label(low, high);
      else if (pane === panes.real || pane === panes.synthetic) setWindow(low, high);
    });
  }
  for (const { label, detail, voxel: place } of settings.jumps) {
    const button = document.createElement("button"), small = document.createElement("small"), item = document.createElement("li");
    button.type = "button";
    small.textContent = detail;
    button.append(label, small);
    button.addEventListener("click", () => moveTo(place));
    item.append(button);
    byId("jumps").append(item);
  }
  for (const button of document.querySelectorAll("[data-plane]")) button.addEventListener("click", () => setPlane(button.dataset.plane));
  for (const button of document.querySelectorAll("[data-level]")) button.addEventListener("click", () => {
    const { level, width } = button.dataset;
    setWindow(level - width / 2, Number(level) + width / 2);
  });
  for (const id of ["level", "width"]) byId(id).addEventListener("change", () => {
    const level = byId("level").valueAsNumber, width = byId("width").valueAsNumber;
    setWindow(level - width / 2, level + width / 2);
  });
  byId("reset").addEventListener("click", () => setWindow(...settings.window));
  byId("flicker")?.addEventListener("click", flicker);
  byId("outline")?.addEventListener("click", event => toggle(event.currentTarget, outline));
  byId("radiological").addEventListener("click", event => toggle(event.currentTarget, turn));
  byId("nearer").addEventListener("click", () => setZoom(1.25));
  byId("farther").addEventListener("click", () => setZoom(0.8));
  document.addEventListener("keydown", press, true);
  byId("packing").textContent = settings.packing;
  setWindow(...settings.window);
  moveTo((settings.jumps.find(jump => jump.label.startsWith("Lesion")) ?? settings.jumps[0] ?? { voxel: dims.map(side => side >> 1) }).voxel);
  byId("progress").textContent = "";
  window.chiasm = { panes };
  document.documentElement.dataset.ready = `${((performance.now() - began) / 1000).toFixed(1)} s`;
}

begin();

// Panes of any volumes: each is a NiiVue of its own, all show the same place in the world. Needs panes.js.
const settings = JSON.parse(byId("settings").textContent);
const panes = []; // of each volume: its settings, its NiiVue, its voxels
let place, radiological = true, plane = "axial", zoom = 1, last;

function times(matrix, point) {
  return matrix.slice(0, 3).map(row => row[0] * point[0] + row[1] * point[1] + row[2] * point[2] + row[3]);
}

function voxelAt(pane, mm) { // the nearest voxel, or null where the volume does not reach
  const voxel = times(pane.inverse, mm).map(Math.round);
  return voxel.every((at, axis) => at >= 0 && at < pane.dims[axis]) ? voxel : null;
}

function valueAt(pane, voxel) {
  return pane.voxels[voxel[0] + pane.dims[0] * (voxel[1] + pane.dims[1] * voxel[2])];
}

function show(mm) {
  place = mm;
  for (const pane of panes) {
    const voxel = voxelAt(pane, mm);
    const step = pane.whole ? 1 : (pane.window[1] - pane.window[0]) / 1000;
    const unit = pane.unit ? ` ${pane.unit}` : "";
    pane.frame.querySelector("figcaption output").textContent = voxel ? `${digits(valueAt(pane, voxel), step)}${unit}` : "outside";
  }
  showWorld(mm);
}

function moveTo(mm, but) { // by the whole affine of each volume, however oblique
  show(mm);
  for (const pane of panes) {
    if (pane === but) continue;
    const edge = pane.dims.map(side => 0.5 / side); // from the border to the centre of the outermost voxel
    pane.viewer.scene.crosshairPos = Array.from(pane.viewer.mm2frac([...mm, 1], 0, true)).slice(0, 3)
      .map((at, axis) => Math.min(1 - edge[axis], Math.max(edge[axis], at)));
    zoomIn(pane.viewer, zoom); // a zoomed pane of a small volume shows the place too
  }
}

function placeOf(pane) {
  return Array.from(pane.viewer.frac2mm(pane.viewer.scene.crosshairPos, 0, true)).slice(0, 3);
}

function describeWindow(pane) {
  const { cal_min: low, cal_max: high } = pane.viewer.volumes[0];
  const level = pane.frame.querySelector(".level");
  if (!level) return;
  const places = Math.max(0, Math.ceil(-Math.log10((high - low) / 1000)));
  level.value = Number(((low + high) / 2).toFixed(places));
  pane.frame.querySelector(".width").value = Number((high - low).toFixed(places));
}

function setWindow(pane, low, high) {
  if (!(low < high)) return;
  const image = pane.viewer.volumes[0];
  [image.cal_min, image.cal_max] = [low, high];
  pane.viewer.updateGLVolume();
  describeWindow(pane);
}

function reset() {
  for (const pane of panes) setWindow(pane, ...pane.window);
}

function same() {
  const { cal_min: low, cal_max: high } = last.viewer.volumes[0];
  for (const pane of panes) if (pane.colours === "gray") setWindow(pane, low, high);
}

function setPlane(name) {
  plane = name;
  showPlane(panes.map(pane => pane.viewer), name);
}

function setZoom(factor) {
  zoom = Math.min(8, Math.max(1, zoom * factor));
  for (const { viewer } of panes) zoomIn(viewer, zoom);
}

function turn() {
  radiological = !radiological;
  byId("radiological").setAttribute("aria-pressed", radiological);
  for (const { viewer } of panes) viewer.setRadiologicalConvention(radiological);
}

function step(way, sign) { // by a voxel of the pane that was used last
  const from = times(last.inverse, place);
  const to = from.map((at, axis) => Math.min(Math.max(Math.round(at + sign * way[axis]), 0), last.dims[axis] - 1));
  moveTo(times(last.affine, to));
}

function press(event) {
  if (event.target.matches("input, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  const { across, up, through } = waysOf(plane, radiological);
  const actions = {
    a: () => setPlane("axial"), c: () => setPlane("coronal"), s: () => setPlane("sagittal"), m: () => setPlane("three"),
    r: turn, w: reset, "+": () => setZoom(1.25), "=": () => setZoom(1.25), "-": () => setZoom(0.8),
    ...(event.target.matches("canvas") ? {
      ArrowLeft: () => step(across, -1), ArrowRight: () => step(across, 1), ArrowUp: () => step(up, 1), ArrowDown: () => step(up, -1),
      PageUp: () => step(through, 1), PageDown: () => step(through, -1),
    } : {}),
  };
  const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  action();
  event.preventDefault();
  event.stopPropagation(); // NiiVue's own keys would move once more
}

async function open(number) {
  const frame = document.querySelector(`[data-pane="${number}"]`);
  const pane = { ...settings.panes[number], frame };
  const image = await load(String(number));
  pane.voxels = image.img;
  if (pane.colours !== "gray") image.colormap = pane.colours; // first, for this sets a range of its own
  [image.cal_min, image.cal_max] = pane.window;
  pane.viewer = makePane(pane.colours === "gray");
  pane.viewer.opts.isSliceMM = settings.tilted; // planes of the world where the volumes' own differ
  await pane.viewer.attachToCanvas(byId(`pane-${number}`));
  pane.viewer.addVolume(image);
  panes.push(pane);
  loaded(number);
  return pane;
}

function connect(pane) {
  const canvas = pane.viewer.canvas;
  pane.viewer.onLocationChange = () => {
    if (canvas.matches(":focus")) moveTo(placeOf(pane), pane);
  };
  canvas.addEventListener("pointerdown", () => canvas.focus({ preventScroll: true }));
  canvas.addEventListener("focus", () => { last = pane; });
  canvas.addEventListener("mouseup", () => describeWindow(pane));
  for (const input of pane.frame.querySelectorAll("input")) input.addEventListener("change", () => {
    const [level, width] = [".level", ".width"].map(name => pane.frame.querySelector(name).valueAsNumber);
    last = pane;
    setWindow(pane, level - width / 2, level + width / 2);
  });
  if (pane.colours === "expected") {
    const step = pane.window[1] / 50;
    showRamp(pane.frame.querySelector(".scale"), "expected", digits(pane.window[0], step), `${digits(pane.window[1], step)}${pane.unit ? ` ${pane.unit}` : ""}`);
  }
}

async function start() {
  byId("viewer").hidden = false;
  const began = performance.now();
  await painted();
  await unpack();
  for (const number of settings.panes.keys()) {
    await open(number);
    await painted();
  }
  panes.forEach(connect);
  last = panes[0];
  for (const button of document.querySelectorAll("[data-plane]")) button.addEventListener("click", () => setPlane(button.dataset.plane));
  byId("reset").addEventListener("click", reset);
  byId("same")?.addEventListener("click", same);
  byId("radiological").addEventListener("click", turn);
  byId("nearer").addEventListener("click", () => setZoom(1.25));
  byId("farther").addEventListener("click", () => setZoom(0.8));
  document.addEventListener("keydown", press, true);
  reset();
  moveTo(times(panes[0].affine, panes[0].centre));
  window.chiasm = { panes };
  document.documentElement.dataset.ready = `${((performance.now() - began) / 1000).toFixed(1)} s`;
}

begin();

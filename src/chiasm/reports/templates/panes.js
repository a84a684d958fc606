// What pages with linked panes share: colours, numbers, and how viewer and volumes are unpacked.
"use strict";
const byId = id => document.getElementById(id);
const PLANES = { axial: "AXIAL", coronal: "CORONAL", sagittal: "SAGITTAL", three: "MULTIPLANAR" };
const COLOURS = { // black where they agree; orange where the synthetic image is brighter, blue where it is darker
  change: { R: [205, 70, 15, 0, 150, 240, 255], G: [240, 160, 75, 0, 55, 145, 240], B: [255, 240, 150, 0, 10, 40, 190], A: [255, 255, 255, 255, 255, 255, 255], I: [0, 48, 93, 128, 163, 208, 255] },
  expected: { R: [0, 68, 59, 33, 94, 253], G: [0, 1, 82, 145, 201, 231], B: [0, 84, 139, 140, 98, 37], A: [0, 255, 255, 255, 255, 255], I: [0, 1, 64, 128, 191, 255] },
};

function digits(value, step) {
  return value.toFixed(Math.min(6, Math.max(0, -Math.floor(Math.log10(step) + 1e-9)))).replace("-", "−");
}

function label(low, high) {
  const step = (high - low) / 200;
  return `${digits(low, step)} to ${digits(high, step)}`;
}

const RAMPS = {
  change: "#cdf0ff,#46a0f0,#0f4b96,#000,#96370a,#f09128,#fff0be",
  expected: "#440154,#3b528b,#21918c,#5ec962,#fde725",
};

function showRamp(scale, colours, low, high) { // a colour bar between its two ends
  const ramp = document.createElement("span");
  ramp.className = "ramp";
  ramp.style.background = `linear-gradient(90deg, ${RAMPS[colours]})`;
  scale.append(low, ramp, high);
}

function makePane(grey) {
  const pane = new niivue.Niivue({
    isRadiologicalConvention: true, sagittalNoseLeft: true, sliceType: niivue.SLICE_TYPE.AXIAL, multiplanarShowRender: niivue.SHOW_RENDER.NEVER,
    multiplanarLayout: niivue.MULTIPLANAR_TYPE.GRID, isForceMouseClickToVoxelCenters: true, dragAndDropEnabled: false,
    dragMode: grey ? niivue.DRAG_MODE.windowing : niivue.DRAG_MODE.none, crosshairColor: [0.35, 0.8, 0.9, 0.85], crosshairWidth: 0.35, crosshairWidthUnit: "percent", crosshairGap: 6,
    viewModeHotKey: "", clipPlaneHotKey: "", cycleClipPlaneHotKey: "", logLevel: "error", loadingText: "", fontMinPx: 12, textHeight: 0.05, fontColor: [0.75, 0.78, 0.8, 1],
  });
  for (const colours in COLOURS) pane.addColormap(colours, COLOURS[colours]);
  return pane;
}

function showPlane(viewers, name) {
  for (const viewer of viewers) {
    viewer.opts.crosshairWidth = name === "three" ? 0.6 : 0.35; // per cent of the breadth, at least a pixel on screen
    viewer.crosshairs3D = null; // so that it is made anew
    viewer.setSliceType(niivue.SLICE_TYPE[PLANES[name]]);
  }
  for (const button of document.querySelectorAll("[data-plane]")) button.setAttribute("aria-pressed", button.dataset.plane === name);
}

function zoomIn(viewer, zoom) { // around the cursor, which stays where it is on the screen
  const at = Array.from(viewer.frac2mm(viewer.scene.crosshairPos)).slice(0, 3);
  viewer.setPan2Dxyzmm([...at.map(mm => mm * (1 - zoom)), zoom]);
}

function showWorld(mm) { // a place in RAS mm, each axis by the side that it lies on
  const sides = [["L", "R"], ["P", "A"], ["I", "S"]];
  byId("world").textContent = sides.map((ends, axis) => `${ends[mm[axis] >= 0 ? 1 : 0]} ${Math.abs(mm[axis]).toFixed(1)}`).join("  ");
}

function waysOf(plane, radiological) { // voxels that arrow keys move by: across, up and through a plane
  return {
    across: plane === "sagittal" ? [0, -1, 0] : [radiological ? -1 : 1, 0, 0],
    up: plane === "axial" || plane === "three" ? [0, 1, 0] : [0, 0, 1],
    through: plane === "coronal" ? [0, 1, 0] : plane === "sagittal" ? [1, 0, 0] : [0, 0, 1],
  };
}

function loaded(name) {
  document.querySelector(`[data-pane="${name}"] .loading`).remove();
}

function painted() { // so that "loading" stands in the panes before the browser is busy
  return new Promise(done => setTimeout(done, 50));
}

async function load(name, restore = bytes => bytes) { // `restore` undoes what was done to a file so that it compresses well
  const element = byId(`volume-${name}`);
  const file = new File([restore(await unpacked(element))], `${name}.nii`);
  element.remove(); // the text is a copy that is needed no more
  return niivue.NVImage.loadFromFile({ file, name: file.name, colormap: "gray" });
}

async function unpacked(element) {
  const packed = Uint8Array.from(atob(element.textContent), letter => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function unpack() { // the viewer stands in the page compressed
  const script = document.createElement("script");
  script.textContent = new TextDecoder().decode(await unpacked(byId("niivue-script")));
  document.head.append(script);
}

function begin() {
  if (document.createElement("canvas").getContext("webgl2")) {
    byId("without").hidden = true;
    start().catch(error => {
      byId("viewer").hidden = true;
      byId("without").hidden = false;
      byId("without").textContent = `The linked panes could not be drawn (${error.message ?? error}); the still slices below remain.`;
      throw error;
    });
  } else {
    byId("without").textContent = "This browser cannot draw volumes (it has no WebGL 2), so the linked panes are missing; the still slices below remain.";
  }
}

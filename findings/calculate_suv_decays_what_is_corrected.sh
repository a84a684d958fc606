#!/usr/bin/env bash
# @cornerstonejs/calculate-suv 1.1.0 corrects PET for decay twice if DecayCorrection is ADMIN: SUV 1.46 times too high an hour after
# injecting F-18. And its SUV by lean mass and body surface is wrong by orders of magnitude in images of unit GML or CNTS.
#
# Input, made here: the attributes of a PET slice (370 MBq of F-18, injected an hour before the scan, 70 kg, 1.75 m, male) with
# DecayCorrection START, where voxels hold the activity at the start of the scan, or ADMIN, where they hold it at the injection. And of
# one in GML (voxels are SUV already) and one in CNTS with Philips' factor from counts to SUV.
#
# Expected: the dose that an image is divided by belongs to the same moment as the image: decayed for START, as injected for ADMIN. QIBA's
# pseudocode, which the readme names as its logic, goes on with START alone. SUVlbm / SUVbw is lean mass / mass for each unit.
#
# Behaviour: DecayCorrection is compared between slices and then never looked at; the dose is always decayed. The factors for lean
# mass and body surface are always (mass or surface) / decayed dose, which is right for voxels in Bq/ml alone; the factor for body
# weight does look at the unit.
#
# Output seen:
#     unit   DecayCorrection   suvbw / expected   (suvlbm / suvbw) / (lean mass / mass)
#     BQML   START             1.000              1.000
#     BQML   ADMIN             1.461              1.000
#     GML                      1.000              0.000276
#     CNTS                     1.000              0.138
#
# Who is hurt: viewers made of cornerstone, which show and measure with these factors. The DICOM files of some scanners say ADMIN. (The
# factor grows with time: 2.1 after two hours; 7.7 an hour after C-11.)
# Horos has the same fault (horos#653). We found no report to cornerstone.
#
# Needs node and npm.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm init --yes > /dev/null
npm install --silent --no-audit --no-fund @cornerstonejs/calculate-suv@1.1.0

cat > finding.cjs <<'JAVASCRIPT'
const { calculateSUVScalingFactors } = require("@cornerstonejs/calculate-suv");

const MASS_KG = 70, HEIGHT_CM = 175, DOSE = 370e6, HALF_LIFE = 6586.2, SECONDS = 3600;
const LEAN = (1.1 * MASS_KG - 120 * (MASS_KG / HEIGHT_CM) ** 2) / MASS_KG; // James' formula, with the library's 120

const slice = (more) => ({
  CorrectedImage: ["ATTN", "DECY"], PatientWeight: MASS_KG, PatientSex: "M", PatientSize: HEIGHT_CM / 100,
  RadionuclideTotalDose: DOSE, RadionuclideHalfLife: HALF_LIFE, RadiopharmaceuticalStartDateTime: "20240229110000",
  SeriesDate: "20240229", SeriesTime: "120000", AcquisitionDate: "20240229", AcquisitionTime: "120000", ...more,
});
const decayed = DOSE * 2 ** (-SECONDS / HALF_LIFE);
const cases = [
  // attributes, the expected factor to SUV by body weight, and what is seen instead
  [{ Units: "BQML", DecayCorrection: "START" }, (1000 * MASS_KG) / decayed, 1, 1],
  [{ Units: "BQML", DecayCorrection: "ADMIN" }, (1000 * MASS_KG) / DOSE, DOSE / decayed, 1],
  [{ Units: "GML", DecayCorrection: "START" }, 1, 1, (1000 * MASS_KG) / decayed],
  [{ Units: "CNTS", DecayCorrection: "START", PhilipsPETPrivateGroup: { SUVScaleFactor: 0.002 } }, 0.002, 1,
    (1000 * MASS_KG) / decayed / 0.002],
];
let changed = [];
for (const [more, expected, seen, seenLean] of cases) {
  const { suvbw, suvlbm } = calculateSUVScalingFactors([slice(more)])[0];
  const [found, lean] = [suvbw / expected, suvlbm / suvbw / LEAN];
  console.log(`${more.Units} ${more.DecayCorrection}: suvbw ${found.toFixed(3)} of what is expected, `
    + `suvlbm / suvbw ${lean.toPrecision(3)} of lean mass / mass`);
  if (Math.abs(found / seen - 1) > 1e-3 || Math.abs(lean / seenLean - 1) > 1e-3) changed.push(`${more.Units} ${more.DecayCorrection}`);
}
if (changed.length) {
  console.error("the behaviour has changed: " + changed.join(", "));
  process.exit(1);
}
console.log("as described: DecayCorrection is not looked at, and suvlbm does not look at the unit");
JAVASCRIPT
node finding.cjs

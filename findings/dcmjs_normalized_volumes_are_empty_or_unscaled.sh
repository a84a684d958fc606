#!/usr/bin/env bash
# dcmjs 0.52.2: normalizeToDataset makes a volume of zeros of a series of slices that dcmjs itself has read, takes the intercept from an
# enhanced CT, scales PET by one slice's slope, and makes unsigned voxels signed.
#
# Input, made here: three CT slices (-1000 to -998 HU), the same as one enhanced file with its intercept in SharedFunctionalGroupsSequence,
# three PET slices whose RescaleSlope is 1, 2 and 3, and three MR slices that use all 16 bits. dcmjs reads each with readFile and
# naturalizeDataset, as its own tests and Cornerstone's adapters do. "Unwrapped": PixelData is taken out of its list before.
#
# Expected: the multi-frame dataset has the same values as the slices, and each frame its own time.
#
# Behaviour: naturalizeDataset puts PixelData into a list of one that hands on byteLength. convertToMultiframe (normalizers.js) asks for
# byteLength and makes a Uint16Array of the list: one number, NaN, hence 0. Slope and intercept are those of the first slice for
# all. normalizeMultiframe takes a PixelRepresentation of 0 for a missing one and writes 1, replaces the scale in the functional
# groups by that of the top level, where an enhanced file has none (so slope 1, intercept 0), and gives the times of the
# slices in the order they came to frames that are sorted by position. The enhanced dataset that it is given is changed itself.
#
# Output seen (values of the frames, from the highest slice to the lowest but for the enhanced file):
#                      true                    seen
#     CT slices        -998, -999, -1000       -1024, -1024, -1024 (stored 0)
#     CT, unwrapped    -998, -999, -1000       -998, -999, -1000
#     enhanced CT      -1000, -999, -998       24, 25, 26
#     PET, unwrapped   3000, 2000, 1000        1000, 1000, 1000
#     MR, unwrapped    40002, 40001, 40000     -25534, -25535, -25536
#     seconds          2, 1, 0                 0, 1, 2
# Nothing is logged.
#
# Who is hurt: whoever makes volumes or enhanced files of series by normalizeToDataset. Segmentations, for which Cornerstone's adapters call
# it, take positions alone. Issues 70 and 193 are about the order of frames, 115 about a PixelRepresentation that was not written.
# We found no report of these.
#
# Needs node and npm.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm init --yes > /dev/null
npm install --silent --no-audit --no-fund dcmjs@0.52.2

cat > finding.cjs <<'JAVASCRIPT'
const dcmjs = require("dcmjs");
const { DicomMessage, DicomMetaDictionary, datasetToBuffer } = dcmjs.data;

const CT = "1.2.840.10008.5.1.4.1.1.2", ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1", PET = "1.2.840.10008.5.1.4.1.1.128";
const MR = "1.2.840.10008.5.1.4.1.1.4";
const ORIENTATION = [1, 0, 0, 0, 1, 0];
const FRAMES = [0, 1, 2];
const logged = [];
for (const level of ["log", "info", "warn", "error"]) {
  const print = console[level];
  console[level] = (...words) => (String(words[0]).startsWith("> ") ? print(...words) : logged.push(words.join(" ")));
}

const image = (kind, modality, stored, more) => ({
  SOPClassUID: kind, SOPInstanceUID: DicomMetaDictionary.uid(), StudyInstanceUID: "1.2.3", SeriesInstanceUID: "1.2.3.4", PatientID: "1",
  Modality: modality, Rows: 2, Columns: 2, BitsAllocated: 16, BitsStored: 16, HighBit: 15, PixelRepresentation: 0, SamplesPerPixel: 1,
  PhotometricInterpretation: "MONOCHROME2", PixelData: Uint16Array.from(stored.flatMap((value) => [value, value, value, value])).buffer,
  _vrMap: { PixelData: "OW" }, _meta: { MediaStorageSOPClassUID: kind, TransferSyntaxUID: "1.2.840.10008.1.2.1" }, ...more,
});
const slices = (kind, modality, stored, slope, intercept) => FRAMES.map((k) => image(kind, modality, [stored(k)], {
  PixelSpacing: [1, 1], SliceThickness: 3, ImagePositionPatient: [0, 0, 3 * k], ImageOrientationPatient: ORIENTATION,
  RescaleSlope: slope(k), RescaleIntercept: intercept, AcquisitionDate: "20240229", AcquisitionTime: String(120000 + k),
}));
const enhanced = (stored, intercept) => image(ENHANCED_CT, "CT", FRAMES.map(stored), {
  NumberOfFrames: 3,
  SharedFunctionalGroupsSequence: [{
    PixelMeasuresSequence: [{ PixelSpacing: [1, 1], SliceThickness: 3 }],
    PlaneOrientationSequence: [{ ImageOrientationPatient: ORIENTATION }],
    PixelValueTransformationSequence: [{ RescaleIntercept: intercept, RescaleSlope: 1, RescaleType: "HU" }],
  }],
  PerFrameFunctionalGroupsSequence: FRAMES.map((k) => ({ PlanePositionSequence: [{ ImagePositionPatient: [0, 0, 3 * k] }] })),
});

function read(dataset) {
  const bytes = datasetToBuffer(dataset);
  const file = DicomMessage.readFile(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
  const found = DicomMetaDictionary.naturalizeDataset(file.dict);
  found._meta = DicomMetaDictionary.namifyDataset(file.meta);
  return found;
}
function unwrapped(dataset) {
  dataset.PixelData = dataset.PixelData[0];
  return dataset;
}
const first = (sequence) => (Array.isArray(sequence) ? sequence[0] : sequence);
// The first voxel of each frame as a reader of the multi-frame dataset gets it, scaled by what all frames share.
function values(dataset) {
  const shared = first(first(dataset.SharedFunctionalGroupsSequence).PixelValueTransformationSequence);
  const Voxels = dataset.PixelRepresentation ? Int16Array : Uint16Array;
  const voxels = new Voxels(Array.isArray(dataset.PixelData) ? dataset.PixelData[0] : dataset.PixelData);
  return FRAMES.map((k) => voxels[4 * k] * Number(shared.RescaleSlope) + Number(shared.RescaleIntercept));
}
const seconds = (dataset) => [...dataset.PerFrameFunctionalGroupsSequence].map(
  (frame) => Number(String(first(frame.FrameContentSequence).FrameAcquisitionDateTime).slice(-1)));
const normalized = (datasets) => dcmjs.normalizers.Normalizer.normalizeToDataset(datasets);

const ct = () => slices(CT, "CT", (k) => 24 + k, () => 1, -1024).map(read);
const mr = () => slices(MR, "MR", (k) => 40000 + k, () => 1, 0).map(read);
const pet = () => slices(PET, "PT", () => 1000, (k) => k + 1, 0).map(read);
const whole = () => [read(enhanced((k) => 24 + k, -1024))];
const cases = [ // what is found, true and seen
  ["enhanced CT before", values(whole()[0]), [-1000, -999, -998], [-1000, -999, -998]],
  ["CT slices", values(normalized(ct())), [-998, -999, -1000], [-1024, -1024, -1024]],
  ["CT, unwrapped", values(normalized(ct().map(unwrapped))), [-998, -999, -1000], [-998, -999, -1000]],
  ["enhanced CT", values(normalized(whole())), [-1000, -999, -998], [24, 25, 26]],
  ["PET, unwrapped", values(normalized(pet().map(unwrapped))), [3000, 2000, 1000], [1000, 1000, 1000]],
  ["MR, unwrapped", values(normalized(mr().map(unwrapped))), [40002, 40001, 40000], [-25534, -25535, -25536]],
  ["seconds of the frames", seconds(normalized(ct())), [2, 1, 0], [0, 1, 2]],
];
const changed = [];
for (const [name, found, expected, seen] of cases) {
  console.log(`> ${name}: ${found.join(", ")}; true ${expected.join(", ")}`);
  if (String(found) !== String(seen)) changed.push(name);
}
if (logged.length) changed.push("something is logged: " + logged.join("; "));
if (changed.length) {
  console.error("> the behaviour has changed: " + changed.join(", "));
  process.exit(1);
}
console.log("> as described: voxels become zeros or signed, and their scale is lost");
JAVASCRIPT
node finding.cjs

#!/usr/bin/env bash
# Daikon 1.2.46 leaves the slices of a series in the order of its files where they are tilted by 37 to 53 degrees, and keeps one slice for
# each time of such a series that states its times.
#
# Input, made here: MR series of six slices of 3 mm, tilted about the patient's x axis, each voxel of which is the number of its slice, in
# files in the order 3, 0, 5, 2, 4, 1; and the same three times (10 and 20 are added), with TemporalPositionIdentifier and
# NumberOfTemporalPositions.
#
# Expected: buildSeries orders slices by position, up or down, and keeps all of them.
#
# Behaviour: slices are sorted by one component of ImagePositionPatient, that of SLICE_DIRECTION_AXIAL (2), CORONAL (1) or SAGITTAL (0).
# Where the row or the column has no component above 0.8, the direction is SLICE_DIRECTION_OBLIQUE, which is 3, and the fourth of
# three components is undefined for all slices. Without times, each slice then counts as a repetition of the one before.
# With times, slices of a time are kept in a map by position (orderByImagePosition), so that each replaces the one before.
#
# Output seen, slices after buildSeries and concatenateImageData:
#     tilt          one time            three times
#     0, 30, 36     0 1 2 3 4 5         0 1 2 3 4 5 10 11 12 13 14 15 20 21 22 23 24 25
#     37, 45, 53    3 0 5 2 4 1         1 11 21
#     54, 60, 90    5 4 3 2 1 0         5 4 3 2 1 0 15 14 13 12 11 10 25 24 23 22 21 20
# There is no error, and numberOfFrames is 1 and 3.
#
# Who is hurt: viewers that read by Daikon, such as Papaya, with MR along the heart, the hippocampi or the optic nerves: short axes of the
# heart over its cycle are both oblique and timed. We found no report, and its readme says nothing.
#
# Needs node and npm.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm init --yes > /dev/null
npm install --silent --no-audit --no-fund daikon@1.2.46 dcmjs@0.52.2 # dcmjs writes the files

cat > finding.cjs <<'JAVASCRIPT'
const daikon = require("daikon");
const { datasetToBuffer } = require("dcmjs").data;

const MR = "1.2.840.10008.5.1.4.1.1.4";
const ORDER = [3, 0, 5, 2, 4, 1];

function slice(number, degrees, time, times) {
  const [cosine, sine] = [Math.cos((degrees * Math.PI) / 180), Math.sin((degrees * Math.PI) / 180)];
  const position = [0, -sine, cosine].map((part) => Number((3 * number * part).toFixed(6))); // along the normal of the slices
  const bytes = datasetToBuffer({
    SOPClassUID: MR, SOPInstanceUID: `1.2.3.${time + 1}.${number + 1}`, StudyInstanceUID: "1.2.3", SeriesInstanceUID: "1.2.3.4",
    Modality: "MR", PatientID: "1", SeriesNumber: 1, InstanceNumber: 6 * time + number + 1, Rows: 2, Columns: 2, PixelSpacing: [1, 1],
    SliceThickness: 3, ImageOrientationPatient: [1, 0, 0, 0, cosine, sine].map((part) => Number(part.toFixed(6))),
    ImagePositionPatient: position, BitsAllocated: 16, BitsStored: 12, HighBit: 11, PixelRepresentation: 0, SamplesPerPixel: 1,
    PhotometricInterpretation: "MONOCHROME2", PixelData: new Uint16Array(4).fill(10 * time + number).buffer, _vrMap: { PixelData: "OW" },
    _meta: { MediaStorageSOPClassUID: MR, TransferSyntaxUID: "1.2.840.10008.1.2.1" },
    ...(times > 1 && { TemporalPositionIdentifier: time + 1, NumberOfTemporalPositions: times }),
  });
  return new DataView(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
}

async function slicesOf(degrees, times) {
  const series = new daikon.Series();
  for (let time = 0; time < times; time++) {
    for (const number of ORDER) {
      const image = daikon.Series.parseImage(slice(number, degrees, time, times));
      if (image === null) throw daikon.Series.parserError;
      if (series.matchesSeries(image)) series.addImage(image);
    }
  }
  if (series.images.length !== 6 * times) throw new Error("not all slices match the series");
  series.buildSeries();
  if (series.numberOfFrames !== times) throw new Error(`numberOfFrames is ${series.numberOfFrames}`);
  const volume = await new Promise((done) => series.concatenateImageData(null, done));
  return [...new Uint16Array(volume)].filter((_, voxel) => voxel % 4 === 0);
}

const up = [0, 1, 2, 3, 4, 5], down = [5, 4, 3, 2, 1, 0];
const timed = (numbers) => [0, 10, 20].flatMap((more) => numbers.map((number) => number + more));
async function main() {
  const changed = [];
  const cases = [[[0, 30, 36], up, timed(up)], [[37, 45, 53], ORDER, [1, 11, 21]], [[54, 60, 90], down, timed(down)]];
  for (const [tilts, once, thrice] of cases) {
    for (const tilt of tilts) {
      for (const [times, seen] of [[1, once], [3, thrice]]) {
        const found = await slicesOf(tilt, times);
        console.log(`${tilt} degrees, times ${times}: ${found.length} of ${6 * times} slices: ${found.join(" ")}`);
        if (String(found) !== String(seen)) changed.push(`${tilt} degrees, times ${times}`);
      }
    }
  }
  if (changed.length) throw new Error("the behaviour has changed: " + changed.join("; "));
  console.log("as described: oblique slices are not sorted, and all but one of each time are lost");
}
main().catch((error) => {
  console.error(error.message);
  process.exit(1);
});
JAVASCRIPT
node finding.cjs

#!/usr/bin/env bash
# MIRP 2.7.0: a CT series of pixels of 2 x 1 mm is read as 1 x 2 mm, so that a mask from a NIfTI file is placed elsewhere and loses a
# quarter of its voxels; single files (dose, enhanced images) likewise.
#
# Input, made here: ten CT slices of 24 rows 2 mm apart and 30 columns 1 mm apart, and a box of 6 rows, 20 columns and 6 slices as a
# mask in NIfTI; an RT dose on the same grid. The same CT as NIfTI, written by SimpleITK from the same slices.
#
# Expected: the box of 720 voxels and 4.3 ml (12 x 20 x 18 mm), from either file.
#
# Behaviour: PixelSpacing states the distance of rows first, then that of columns. MIRP's spacing is (z, y, x), and it writes
# the slice distance and then both values in reverse (dicom_file_stack.py), or reverses the list of both and the slice distance
# (dicom_file_rtdose.py, dicom_multi_frame.py, dicom_file.py). Both give the distance of columns as y. The mask is then
# resampled onto the wrong grid.
#
# Output seen, (z, y, x) in mm and features of the box:
#                    spacing      voxels    volume, mm3    surface, mm2
#     NIfTI          3, 2, 1      720       4228            1524
#     DICOM series   3, 1, 2      540       3169            1314
#     RT dose        3, 1, 2
# Nothing is said about it. For square pixels both are the same.
#
# Who is hurt: whoever extracts features from scans with oblong pixels (mammography, some MR, dose grids, resampled CT): shape, texture
# after resampling, masks from other files. We found no report. What helps: a NIfTI file made by another program.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    mirp==2.7.0 pydicom==3.0.2 simpleitk==2.5.7 numpy==2.4.6 scipy==1.17.1 pandas==3.1.1 itk==5.4.7

cat > "$work/finding.py" <<'PYTHON'
import logging
import os
import tempfile
import warnings
from importlib.metadata import version

import numpy as np
import pydicom
import SimpleITK as sitk
from mirp import extract_features, extract_images
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RTDoseStorage, generate_uid

FOLDER = tempfile.mkdtemp()
VOXELS = np.random.default_rng(0).integers(0, 2000, (10, 24, 30)).astype(np.uint16)
logging.disable(logging.INFO)


def dataset(modality, storage, voxels):
    made = pydicom.Dataset()
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = storage
    made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    made.StudyInstanceUID, made.SeriesInstanceUID, made.FrameOfReferenceUID = "1.2.3", f"1.2.3.{len(modality)}", "1.2.3.1"
    made.Modality, made.PatientID, made.PatientName = modality, "phantom", "phantom"
    made.SamplesPerPixel, made.PhotometricInterpretation, made.PixelRepresentation = 1, "MONOCHROME2", 0
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, 16, 15
    made.Rows, made.Columns = voxels.shape[-2:]
    made.PixelSpacing = [2, 1]  # rows are 2 mm apart, columns 1 mm
    made.ImageOrientationPatient, made.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 0]
    made.PixelData = voxels.tobytes()
    return made


os.makedirs(f"{FOLDER}/ct")
for k, pixels in enumerate(VOXELS):
    one = dataset("CT", CTImageStorage, pixels)
    one.SliceThickness, one.InstanceNumber, one.ImagePositionPatient = 3, k + 1, [0, 0, 3 * k]
    one.RescaleSlope, one.RescaleIntercept = 1, -1000
    one.save_as(f"{FOLDER}/ct/{k:02}.dcm", enforce_file_format=True)
dose = dataset("RTDOSE", RTDoseStorage, VOXELS)
dose.NumberOfFrames, dose.FrameIncrementPointer = 10, 0x3004000C
dose.GridFrameOffsetVector, dose.DoseGridScaling = [3 * k for k in range(10)], 0.001
dose.DoseUnits, dose.DoseType, dose.DoseSummationType = "GY", "PHYSICAL", "PLAN"
dose.save_as(f"{FOLDER}/dose.dcm", enforce_file_format=True)
reader = sitk.ImageSeriesReader()
reader.SetFileNames(sorted(f"{FOLDER}/ct/{name}" for name in os.listdir(f"{FOLDER}/ct")))
image = reader.Execute()
sitk.WriteImage(image, f"{FOLDER}/ct.nii.gz")
box = np.zeros(VOXELS.shape, np.uint8)
box[2:8, 8:14, 5:25] = 1
mask = sitk.GetImageFromArray(box)
mask.CopyInformation(image)
sitk.WriteImage(mask, f"{FOLDER}/box.nii.gz")


def read(source, modality):
    """What MIRP takes the spacing, the box's voxels, its volume and its surface for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {"image": source, "mask": f"{FOLDER}/box.nii.gz", "image_modality": modality}
        images, masks = extract_images(**given, image_export_format="native", write_images=False)[0]
        features = extract_features(**given, base_feature_families=["morphological"])[0]
    volume, surface = float(features["morph_volume"].iloc[0]), float(features["morph_area_mesh"].iloc[0])
    return tuple(float(mm) for mm in images[0].image_spacing), int(masks[0].roi.get_voxel_grid().sum()), volume, surface


print("mirp", version("mirp"), "SimpleITK reads", image.GetSpacing()[::-1])
changed = []
for name, source, modality, seen in (
    ("NIfTI", f"{FOLDER}/ct.nii.gz", "ct", ((3, 2, 1), 720, 4228, 1524)),
    ("DICOM series", f"{FOLDER}/ct", "ct", ((3, 1, 2), 540, 3169, 1314)),
    ("RT dose", f"{FOLDER}/dose.dcm", "rtdose", ((3, 1, 2), 540, 3169, 1314)),
):
    found = read(source, modality)
    print(f"{name}: spacing {found[0]} mm, {found[1]} voxels, {found[2]:.0f} mm3, {found[3]:.0f} mm2")
    if found[:2] != seen[:2] or not np.allclose(found[2:], seen[2:], atol=1):
        changed.append(name)
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: rows and columns exchange their distances")
PYTHON
"$work/venv/bin/python" "$work/finding.py"

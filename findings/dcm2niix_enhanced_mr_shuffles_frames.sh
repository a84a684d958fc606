#!/usr/bin/env bash
# dcm2niix 1.0.20260724 (from PyPI): the same enhanced MR file converts well or badly, by its Manufacturer alone.
#
# Input, made here: one multi-frame file (Enhanced MR Image Storage) with two volumes of six slices, 5 mm apart. The
# whole first volume stands before the whole second one. The dimension indices say stack, volume, slice in stack. The
# volumes differ in the time point (TemporalPositionIndex) or in the echo time (EffectiveEchoTime, 10 and 30 ms). Every
# file is made in the same way, but for UIDs and the word in Manufacturer. dciodvfy (dicom3tools) finds no error in any.
# Slice z of volume 1 holds the value 100 + z, slice z of volume 2 the value 200 + z.
#
# Behaviour:
# - Manufacturer "Philips Medical Systems" or "Canon": each volume comes out whole (two files, or one 4D file).
# - Manufacturer "SIEMENS" or "GE MEDICAL SYSTEMS", two time points: one 4D file of the right shape, in which each
#   "volume" mixes both time points and holds only one half of the body, each position twice:
#     100 200 101 201 102 202 | 103 203 104 204 105 205
# - the same manufacturers, two echo times: one 3D file of 12 slices, 5 mm apart, in which the echo times
#   alternate. The body is twice as tall as it was, and the JSON file states one echo time, 0.03 s, for all:
#     100 200 101 201 102 202 103 203 104 204 105 205
# No message says that frames were moved, and the exit status is 0. The options were the defaults.
#
# Version 1.0.20220720 (Debian 12) makes one 3D file of 12 alternating slices in both cases, and states 0.01 s for all.
# A mixture of magnitude and phase frames in Siemens files is reported as rordenlab/dcm2niix#1033, where a maintainer
# calls such files legal and unusual. We found no report and no documentation for what is shown here: that plain time
# points and echo times lose their order, too, and that the word in Manufacturer decides.
#
# Who is hurt: whoever converts a multi-frame file with several volumes, for example one that another program merged.
# The 4D file has the expected shape, so that only a look at the slices shows the fault.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    dcm2niix==1.0.20260724 nibabel==5.4.2 numpy==2.4.6 pydicom==3.0.2

cat > "$work/finding.py" <<'PYTHON'
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, generate_uid

SLICES, ROWS, COLUMNS = 6, 16, 12
DAY, TIME = "20240229", "120500"
FIRST, SECOND = [100, 101, 102, 103, 104, 105], [200, 201, 202, 203, 204, 205]
ALTERNATING = [value for pair in zip(FIRST, SECOND) for value in pair]
STACK, SLICE = (0x00209056, 0x00209111), (0x00209057, 0x00209111)
VOLUME = {"time points": (0x00209128, 0x00209111), "echo times": (0x00189082, 0x00189114)}

# what version 1.0.20260724 gives, sorted: the values of the slices of each volume of each file
WHOLE = {"time points": [[FIRST, SECOND]], "echo times": [[FIRST], [SECOND]]}
SHUFFLED = {"time points": [[ALTERNATING[:6], ALTERNATING[6:]]], "echo times": [[ALTERNATING]]}
EXPECTED = {"Philips Medical Systems": WHOLE, "Canon": WHOLE, "SIEMENS": SHUFFLED, "GE MEDICAL SYSTEMS": SHUFFLED}


def item(**values):
    dataset = Dataset()
    for name, value in values.items():
        setattr(dataset, name, value)
    return dataset


def image_type(name):
    return {
        name: ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        "PixelPresentation": "MONOCHROME",
        "VolumetricProperties": "VOLUME",
        "VolumeBasedCalculationTechnique": "NONE",
        "ComplexImageComponent": "MAGNITUDE",
        "AcquisitionContrast": "T2",
    }


def shared_groups():
    """What the standard asks for and what is the same in all frames."""
    head = item(CodeValue="69536005", CodingSchemeDesignator="SCT", CodeMeaning="Head")
    absorbed = item(SpecificAbsorptionRateDefinition="IEC_HEAD", SpecificAbsorptionRateValue=0.5)
    mode = item(OperatingModeType="STATIC FIELD", OperatingMode="IEC_NORMAL")
    return {
        "PixelMeasuresSequence": item(PixelSpacing=[1, 1], SliceThickness=5, SpacingBetweenSlices=5),
        "PlaneOrientationSequence": item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        "PixelValueTransformationSequence": item(RescaleIntercept=0, RescaleSlope=1, RescaleType="US"),
        "FrameAnatomySequence": item(FrameLaterality="U", AnatomicRegionSequence=[head]),
        "MRImageFrameTypeSequence": item(**image_type("FrameType")),
        "MRTimingAndRelatedParametersSequence": item(
            RepetitionTime=3000.0, FlipAngle=90.0, EchoTrainLength=1, RFEchoTrainLength=1, GradientEchoTrainLength=0,
            SpecificAbsorptionRateSequence=[absorbed], OperatingModeSequence=[mode], GradientOutputType="DB_DT",
            GradientOutput=1.0,
        ),
        "MRModifierSequence": item(
            InversionRecovery="NO", FlowCompensation="NONE", Spoiling="NONE", T2Preparation="NO",
            SpectrallySelectedExcitation="NONE", SpatialPresaturation="NONE", PartialFourier="NO",
            ParallelAcquisition="NO",
        ),
        "MRImagingModifierSequence": item(
            MagnetizationTransfer="NONE", BloodSignalNulling="NO", Tagging="NONE", TransmitterFrequency=123.2,
            PixelBandwidth=200.0,
        ),
        "MRReceiveCoilSequence": item(
            ReceiveCoilName="H", ReceiveCoilManufacturerName="", ReceiveCoilType="VOLUME", QuadratureReceiveCoil="YES",
        ),
        "MRTransmitCoilSequence": item(
            TransmitCoilName="B", TransmitCoilManufacturerName="", TransmitCoilType="BODY",
        ),
        "MRAveragesSequence": item(NumberOfAverages=1.0),
        "MRFOVGeometrySequence": item(
            InPlanePhaseEncodingDirection="ROW", MRAcquisitionFrequencyEncodingSteps=ROWS,
            MRAcquisitionPhaseEncodingStepsInPlane=COLUMNS, PercentSampling=100.0, PercentPhaseFieldOfView=100.0,
        ),
    }  # fmt: skip


def frame(volume, z, what):
    minute = volume if what == "time points" else 0
    moment = f"{DAY}12{5 + minute:02d}00"
    content = item(
        StackID="1", InStackPositionNumber=z + 1, DimensionIndexValues=[1, volume + 1, z + 1],
        FrameReferenceDateTime=moment, FrameAcquisitionDateTime=moment, FrameAcquisitionDuration=60000.0,
    )  # fmt: skip
    if what == "time points":
        content.TemporalPositionIndex = volume + 1
    return item(
        FrameContentSequence=[content],
        PlanePositionSequence=[item(ImagePositionPatient=[-6, -8, 5 * z])],
        MREchoSequence=[item(EffectiveEchoTime=30.0 if what == "echo times" and volume else 10.0)],
    )


def write(path, manufacturer, what):
    d = item(
        SpecificCharacterSet="ISO_IR 100", SOPClassUID=EnhancedMRImageStorage, SOPInstanceUID=generate_uid(),
        Modality="MR", StudyInstanceUID=generate_uid(), SeriesInstanceUID=generate_uid(),
        FrameOfReferenceUID=generate_uid(), PatientName="Phantom^", PatientID="PHANTOM", PatientBirthDate="",
        PatientSex="", StudyID="1", AccessionNumber="", ReferringPhysicianName="", StudyDate=DAY, StudyTime=TIME,
        SeriesDate=DAY, SeriesTime=TIME, ContentDate=DAY, ContentTime=TIME, AcquisitionDateTime=DAY + TIME,
        AcquisitionDuration=60.0, Manufacturer=manufacturer, ManufacturerModelName="Model", DeviceSerialNumber="1",
        SoftwareVersions="1", SeriesNumber=4, InstanceNumber=1, AcquisitionNumber=1, PatientPosition="HFS",
        PositionReferenceIndicator="", ContentQualification="RESEARCH", ResonantNucleus="1H", KSpaceFiltering="NONE",
        MagneticFieldStrength=3.0, ApplicableSafetyStandardAgency="IEC", BurnedInAnnotation="NO",
        LossyImageCompression="00", PresentationLUTShape="IDENTITY", PulseSequenceName="SE", MRAcquisitionType="2D",
        EchoPulseSequence="SPIN", MultipleSpinEcho="NO", MultiPlanarExcitation="NO", PhaseContrast="NO",
        TimeOfFlightContrast="NO", SteadyStatePulseSequence="NONE", EchoPlanarPulseSequence="NO",
        SaturationRecovery="NO", SpectrallySelectedSuppression="NONE", OversamplingPhase="NONE",
        GeometryOfKSpaceTraversal="RECTILINEAR", SegmentedKSpaceTraversal="SINGLE",
        RectilinearPhaseEncodeReordering="LINEAR", NumberOfKSpaceTrajectories=1, AcquisitionContextSequence=[],
        SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", Rows=ROWS, Columns=COLUMNS, BitsAllocated=16,
        BitsStored=16, HighBit=15, PixelRepresentation=0, NumberOfFrames=2 * SLICES, **image_type("ImageType"),
    )  # fmt: skip
    organization = generate_uid()
    d.DimensionOrganizationSequence = [item(DimensionOrganizationUID=organization)]
    d.DimensionIndexSequence = [
        item(DimensionOrganizationUID=organization, DimensionIndexPointer=pointer, FunctionalGroupPointer=group)
        for pointer, group in (STACK, VOLUME[what], SLICE)
    ]
    d.SharedFunctionalGroupsSequence = [item(**{name: [group] for name, group in shared_groups().items()})]
    order = list(product(range(2), range(SLICES)))  # the first volume, then the second
    d.PerFrameFunctionalGroupsSequence = [frame(volume, z, what) for volume, z in order]
    values = np.array([100 * (volume + 1) + z for volume, z in order], "<u2")
    d.PixelData = np.repeat(values, ROWS * COLUMNS).tobytes()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.save_as(path, enforce_file_format=True)


def converted(folder):
    """The value of each slice of each volume of each file that dcm2niix wrote, and what it stated beside it."""
    files = []
    for path in sorted(folder.glob("*.nii")):
        image = nibabel.load(path)
        values = np.asarray(image.dataobj)
        assert (values == values[:1, :1]).all(), "a slice is no longer of one value"
        slices = np.atleast_2d(values[0, 0].T).tolist()
        echo = json.loads(path.with_suffix(".json").read_text()).get("EchoTime")
        print(f"    {path.name} {values.shape}, slices {image.header.get_zooms()[2]:g} mm apart, EchoTime {echo} s")
        for volume in slices:
            print("       ", *volume)
        files.append(slices)
    return sorted(files)


work = Path(sys.argv[1])
program = str(Path(sys.executable).with_name("dcm2niix"))
changed = []
for number, (manufacturer, what) in enumerate(product(EXPECTED, VOLUME)):
    source, made = work / f"in{number}", work / f"out{number}"
    source.mkdir()
    made.mkdir()
    write(source / "image.dcm", manufacturer, what)
    done = subprocess.run([program, "-f", "made", "-o", made, source], capture_output=True, text=True)
    if not number:
        print(done.stdout.splitlines()[0])
    print(f"{manufacturer}, two {what}: exit status {done.returncode}")
    for line in (done.stdout + done.stderr).splitlines():
        if line.startswith(("Warning", "Error")):
            print("   ", line.replace(str(work), "WORK"))
    if converted(made) != EXPECTED[manufacturer][what] or done.returncode:
        changed.append(f"{manufacturer}, two {what}")
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: SIEMENS and GE are shuffled, Philips and Canon are whole")
PYTHON
"$work/venv/bin/python" "$work/finding.py" "$work"

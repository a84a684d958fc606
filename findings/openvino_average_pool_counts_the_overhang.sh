#!/usr/bin/env bash
# OpenVINO 2026.4.1, CPU: average pooling with padding and ceil_mode darkens the last plane along each axis, up to 3.4 times
# in the corner of a volume.
#
# Input, made here: AvgPool1d, 2d and 3d (3, stride=2, padding=1, ceil_mode=True) on 16 voxels of the value 1 along each
# axis, by convert_model from torch, and the same layer as an ONNX file (AveragePool of opset 22).
#
# Expected: with ceil_mode, the last window begins at voxel 15 and reaches past the padding: it holds one voxel, one place
# of the padding, and one place that does not exist. torch divides by the places that exist, 2 and not 3 along each axis,
# and ONNX describes the same. OpenVINO's converter knows the case: the layer that it writes says ceil_torch.
#
# Behaviour: the shape is right, and the last window is divided by the whole kernel. OpenVINO's CPU plugin lengthens the
# padding at the end until oneDNN's rule for sizes (floor) yields the size that it wants, and oneDNN's average "with
# padding" divides by the kernel's size wherever the window lies. The plugin then puts the padding's true length back into
# the primitive, so that the divisor may follow (pooling.cpp says so in a comment), and the divisor does not follow.
# Without padding, without an overhang (15 or 17 voxels), or with count_include_pad=False all is well.
#
# Output seen, the last voxel of a volume of ones, and how many voxels of the output are wrong:
#     1D  0.333 for 0.500  11 %        2D  0.111 for 0.250  21 %        3D  0.037 for 0.125  30 %
# onnxruntime 1.32.0 and torch agree with each other on both forms.
#
# Who is hurt: networks that halve an odd or unpadded size this way, such as pyramids of 2D and 3D images: only the far
# border of the prediction is off, and only for input sizes that leave an overhang, which a test at another size misses.
# The same slip was reported and mended in onnxruntime (issue 16203, pull request 29629). We found no report for OpenVINO;
# its pull request 36714 is about the shape.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    openvino==2026.4.1 torch==2.13.0 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

sys.modules["openvino_telemetry"] = None  # OpenVINO then sends nothing

import numpy as np
import onnx
import onnxruntime
import openvino
import torch

CORE = openvino.Core()
LAYERS = {1: torch.nn.AvgPool1d, 2: torch.nn.AvgPool2d, 3: torch.nn.AvgPool3d}
LAST = {1: 1 / 3, 2: 1 / 9, 3: 1 / 27}


def by_openvino(model, image):
    compiled = CORE.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return next(iter(compiled(image).values()))


def onnx_file(dims, image, path):
    node = onnx.helper.make_node("AveragePool", ["image"], ["pooled"], kernel_shape=[3] * dims, strides=[2] * dims,
                                 pads=[1] * 2 * dims, ceil_mode=1, count_include_pad=1)  # fmt: skip
    kind = onnx.TensorProto.FLOAT
    given = onnx.helper.make_tensor_value_info("image", kind, image.shape)
    made = onnx.helper.make_tensor_value_info("pooled", kind, [1, 1] + [None] * dims)
    graph = onnx.helper.make_graph([node], "pool", [given], [made])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return str(path)


print(*(f"{name} {version(name)}" for name in ("openvino", "torch", "onnx", "onnxruntime")))
changed = []
for dims, layer in LAYERS.items():
    image = np.ones([1, 1] + [16] * dims, np.float32)
    module = layer(3, stride=2, padding=1, ceil_mode=True)
    right = module(torch.from_numpy(image)).numpy()
    model = openvino.convert_model(module, example_input=torch.from_numpy(image))
    rounding = {op.get_attributes()["rounding_type"] for op in model.get_ops() if op.get_type_name() == "AvgPool"}
    path = onnx_file(dims, image, Path(sys.argv[1]) / f"pool{dims}.onnx")
    ways = {
        "openvino from torch": by_openvino(model, image),
        "openvino from ONNX": by_openvino(CORE.read_model(path), image),
        "onnxruntime": onnxruntime.InferenceSession(path).run(None, {"image": image})[0],
    }
    print(f"{dims}D, rounding {', '.join(rounding)}; torch: last voxel {right.flat[-1]:.3f}")
    for way, pooled in ways.items():
        wrong = np.abs(pooled - right) > 1e-3
        print(f"    {way:20} last voxel {pooled.flat[-1]:.3f}, {wrong.mean():.0%} of the voxels differ")
        last = pooled.flat[-1] - (right.flat[-1] if way == "onnxruntime" else LAST[dims])
        if pooled.shape != right.shape or abs(last) > 1e-4 or wrong.any() == (way == "onnxruntime"):
            changed.append(f"{way}, {dims}D")
print("where it does not happen:")
for side, options in ((15, {"padding": 1}), (17, {"padding": 1}), (16, {}), (16, {"padding": 1, "count_include_pad": False})):
    image = np.ones([1, 1] + [side] * 3, np.float32)
    module = torch.nn.AvgPool3d(3, stride=2, ceil_mode=True, **options)
    model = openvino.convert_model(module, example_input=torch.from_numpy(image))
    apart = np.abs(by_openvino(model, image) - module(torch.from_numpy(image)).numpy()).max()
    print(f"    {side} voxels, {options or 'no padding'}: largest difference {apart:.0e}")
    if apart > 1e-4:
        changed.append(f"{side} voxels, {options}")
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: OpenVINO divides the last window by the whole kernel")
PYTHON
"$work/venv/bin/python" "$work/finding.py" "$work"

#!/usr/bin/env bash
# torch 2.13.0, CPU with AVX-512: in bfloat16, a convolution on a narrow grid takes old memory for the gradient of its weights.
#
# Input, made here: a Conv2d of 3 x 3, padding 1, every second voxel, in bfloat16, on features of 8 x 1: one voxel wide. Such
# grids are what the lowest levels of a U-Net or of a discriminator have; autocast("cpu", torch.bfloat16) leads there too.
#
# Behaviour: with width 1, the left and the right column of the kernel lie on padding alone, so that their gradient is 0.
# oneDNN's kernel for this (jit_bf16:avx512_core_bf16 in ONEDNN_VERBOSE=1) does not write it: torch.autograd returns what the
# memory held before, which is 0 in a fresh process, and later any number, 1e30 and NaN among them. Output, gradient of the
# features and of the middle column are right. float32 is right, and so is bfloat16 on a width of 2. With
# ONEDNN_MAX_CPU_ISA=AVX512_CORE, as on processors with AVX-512 and no bfloat16, it is the same.
# Three-dimensional convolutions have it more often, where a kernel reaches over both ends of an axis that it slides along
# (kernels of 3, 4, 5 and 7 were tried); some of those calls ended the process, and are not repeated here.
#
# Output seen, 200 times after memory was used for numbers of 1e30:
#     float32,  width 1: wrong in   0, largest gradient in the outer columns 0
#     bfloat16, width 2: wrong in   0
#     bfloat16, width 1: wrong in 198, largest gradient in the outer columns inf
#
# Who is hurt: whoever trains with autocast on a CPU. Losses stay finite, and one update later weights are NaN or of any size;
# it depends on what ran before, so that it comes and goes between runs of the same seed. A 3D U-Net of 5 levels on patches of
# 32 x 32 x 16 had it in a quarter of its runs of 8 steps.
# We searched the issues of torch and oneDNN and found the like only for other kernels (pytorch 68868, oneDNN 6035 and 4124).
set -euo pipefail

if ! grep --quiet --word-regexp avx512f /proc/cpuinfo; then
    echo "skipped: this processor has no AVX-512, and another kernel computes the convolution" >&2
    exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import torch

TIMES = 200


def outer_columns(dtype, width):
    """Return the gradient of the kernel's left and right column, in float32."""
    torch.manual_seed(0)
    layout = {"dtype": dtype, "memory_format": torch.channels_last}
    features = torch.randn(2, 32, 8, width).to(**layout)
    weight = (0.05 * torch.randn(32, 32, 3, 3)).to(**layout).requires_grad_()
    torch.nn.functional.conv2d(features, weight, padding=1, stride=2).float().sum().backward()
    return weight.grad.float()[..., ::2]


def count(dtype, width):
    """Use memory for other numbers, ask for the gradient, and compare it with the one in float32."""
    right, wrong, largest = outer_columns(torch.float32, width), 0, 0.0
    for _ in range(TIMES):
        used = [torch.full((size,), 1e30) for size in (3000, 9216, 20000, 40000)]
        del used
        found = outer_columns(dtype, width)
        close = (found - right).abs() <= 0.05 * right.abs().max() + 1e-6
        wrong += not bool(close.all())
        largest = max(largest, float(found.nan_to_num(torch.inf).abs().max()))
    print(f"{str(dtype):14} width {width}: wrong in {wrong:3}, largest gradient in the outer columns {largest:.2g}")
    return wrong


print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
assert count(torch.float32, 1) == 0
assert count(torch.bfloat16, 2) == 0
assert count(torch.bfloat16, 1) > TIMES / 2, "the behaviour changed: gradients are right"
PYTHON

"$work/venv/bin/python" "$work/finding.py"
echo "as described"

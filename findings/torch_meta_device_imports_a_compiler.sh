#!/usr/bin/env bash
# torch 2.13.0: on the meta device, which is there to cost nothing, some ways to fill a tensor import torch's compiler.
#
# Input, made here: tensors of a few elements on the meta device, which has shapes and no numbers. Each operation runs
# as the first one of a process of its own, after `import torch`.
#
# Behaviour: uniform_, kaiming_uniform_, trunc_normal_, zero_, nn.Linear, nn.Conv2d and nn.LayerNorm take less than a
# millisecond and import nothing. arange and linspace import 487 modules, among them sympy and mpmath; normal_ imports
# 823 or more, and with them torch's decompositions. So does nn.Embedding, whose weights are drawn by normal_, and every network
# that draws its weights so. The first such call takes 0.3 to 1.5 s of CPU time; later ones take none. On the CPU the
# same operations import nothing. There is no message.
# The cause: these three have no meta kernel in C++, and the one in Python is found in torch._refs, torch._meta_registrations
# and torch.fx.experimental.symbolic_shapes, which import sympy at their heads.
#
# Output seen (modules imported, seconds of CPU time, sympy among them):
#     uniform_ 0 0.00 no            normal_   823 1.46 yes
#     Linear   0 0.00 no            Embedding 823 1.19 yes
#     Conv2d   0 0.00 no            linspace  487 0.31 yes
#     LayerNorm 0 0.00 no           arange    487 0.31 yes
#
# Who is hurt: whoever compares a model's shapes with a file of weights before memory is taken for it, in a command that
# should start at once. A TorchFunctionMode that answers these calls by the shape alone avoids it.
# We searched the project's issues: that sympy makes `import torch` slow was reported and mended in 2023 by importing it
# late; this is what "late" means. We found no report of the meta device.
# The script needs no GPU. An index that offers torch for the CPU alone saves gigabytes.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import subprocess
import sys
from importlib.metadata import version

FREE = {
    "zero_": "w.zero_()",
    "uniform_": "w.uniform_(-1, 1)",
    "kaiming_uniform_": "torch.nn.init.kaiming_uniform_(w)",
    "trunc_normal_": "torch.nn.init.trunc_normal_(w)",
    "Linear": "torch.nn.Linear(3, 3, device='meta')",
    "Conv2d": "torch.nn.Conv2d(3, 3, 3, device='meta')",
    "LayerNorm": "torch.nn.LayerNorm(3, device='meta')",
    "normal_ on the CPU": "torch.empty(3, 3).normal_()",
    "arange on the CPU": "torch.arange(8)",
}
DEAR = {
    "normal_": "w.normal_()",
    "Embedding": "torch.nn.Embedding(3, 3, device='meta')",
    "linspace": "torch.linspace(0.0, 1.0, 8, device='meta')",
    "arange": "torch.arange(8, device='meta')",
}
PROGRAM = """
import sys, time, torch
w = torch.empty(3, 3, device="meta")
before, start = set(sys.modules), time.process_time()
{}
spent = time.process_time() - start
print(len(set(sys.modules) - before), f"{{spent:.2f}}", "sympy" in sys.modules)
"""


def first_call(code):
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(code)], capture_output=True, text=True, check=True)
    modules, seconds, sympy = done.stdout.split()
    return int(modules), float(seconds), sympy == "True"


print(f"torch {version('torch')}")
found = {name: first_call(code) for name, code in {**FREE, **DEAR}.items()}
for name, (modules, seconds, sympy) in found.items():
    print(f"{name:20} {modules:4} modules  {seconds:.2f} s  sympy {'yes' if sympy else 'no'}")
wrong = [name for name in FREE if found[name][0] > 0 or found[name][2]]
wrong += [name for name in DEAR if found[name][0] < 300 or not found[name][2]]
if wrong:
    sys.exit(f"behaves otherwise than described: {', '.join(wrong)}")
print("as described")
PYTHON
"$work/venv/bin/python" "$work/finding.py"

#!/usr/bin/env bash
# torch 2.13.0, CPU: Adam(fused=True) pairs weights with the moments of other weights where their memory layouts differ.
#
# Input, made here: a convolution of 3 to 4 channels is trained for some steps with Adam, weights in the usual layout. Its
# state dicts are loaded into the same network in the channels-last layout, as somebody would who reads that channels-last
# is faster and resumes his training; and the other way round.
#
# Behaviour: Optimizer.load_state_dict keeps the layout of the moments that it is given, not that of the weights. The plain
# and the foreach implementations do not mind: they address elements by their index. The fused one for the CPU walks through
# weights, gradients and moments by their place in memory, without a look at the strides, so that each weight is moved by
# another one's moments. There is no message, for shapes and types agree.
# On a GPU the same call is refused: "params, grads, exp_avgs, and exp_avg_sqs must have same dtype, device, and layout".
#
# Output seen: largest difference of the weights after 20 steps from a training that kept its layout
#     fused             resumed in the other layout   0.08, at weights of 0.04 on average
#     foreach or plain  resumed in the other layout   0
# With the moments brought to the layout of their weights after load_state_dict, fused agrees too.
#
# Who is hurt: whoever resumes a training on a CPU with another memory format than it was begun with, or converts a network
# with to(memory_format=...) after the first steps, or keeps optimiser states in a format that stores contiguous tensors.
# We searched torch's issues: the refusal on GPUs is reported (110758, 106951), this is not.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import copy

import torch

STEPS, LATER = 10, 20
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
WAYS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "plain": {"foreach": False, "fused": False}}


def make(layout, way):
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 4, 3, bias=False).to(memory_format=LAYOUTS[layout])
    return network, torch.optim.Adam(network.parameters(), lr=0.01, **WAYS[way])


def train(network, optimiser, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(2, 3, 16, 16, generator=generator)
        wanted = images.mean(1, keepdim=True)[..., 1:-1, 1:-1].expand(-1, 4, -1, -1)
        optimiser.zero_grad()
        (network(images) - wanted).square().mean().backward()
        optimiser.step()


def resumed(layout, way, realign=False):
    """Begin in one layout and go on in the other, by state dicts alone."""
    other = next(name for name in LAYOUTS if name != layout)
    network, optimiser = make(layout, way)
    train(network, optimiser, 0, STEPS)
    later, its = make(other, way)
    later.load_state_dict(network.state_dict())
    its.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    if realign:
        for weight, state in its.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].contiguous(memory_format=LAYOUTS[other])
    train(later, its, STEPS, STEPS + LATER)
    return later.weight.detach()


def unbroken(layout, way):
    network, optimiser = make(layout, way)
    train(network, optimiser, 0, STEPS + LATER)
    return network.weight.detach()


print("torch", torch.__version__, "weights of", f"{unbroken('contiguous', 'plain').abs().mean():.2f} on average")
changed = []
for layout in LAYOUTS:
    for way in WAYS:
        apart = (resumed(layout, way) - unbroken(layout, way)).abs().max().item()
        print(f"begun {layout:13} {way:8} resumed in the other layout: {apart:.1e}")
        if (apart > 0.01) != (way == "fused"):
            changed.append(f"{way} from {layout}")
    mended = (resumed(layout, "fused", realign=True) - unbroken(layout, "fused")).abs().max().item()
    print(f"begun {layout:13} fused    with its moments brought to the layout of the weights: {mended:.1e}")
    if mended > 1e-4:
        changed.append(f"mended from {layout}")
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: fused Adam on a CPU takes moments by their place in memory")
PYTHON
"$work/venv/bin/python" "$work/finding.py"

"""One self-contained page: what was asked, what was found, and the pictures to judge it by.

The page needs no network, no server and no other file.  It says in words how
the method stands against the best naive baseline, worse as plainly as better,
and what is missing.  The same input gives the same bytes.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from numpy.typing import NDArray

from chiasm.evidence.evaluation import Row, summarise
from chiasm.storage import write_text

MOST_PIXELS = 400  # along a picture's longer side; larger slices are thinned
MOST_POINTS = 250  # of a drawn curve; longer ones are averaged
MARGIN = 4  # voxels around the mask in a picture
WHOLE_SHARE = 0.995  # of the voxels lie inside the error maps' colour range
FEW_CASES = 10  # below this the page says that they are few
ACCURACY_RANGE = (0.55, 0.97)  # outside, a discriminator knows nothing or everything
FLAT_RATIO = 0.05  # a weight ratio within 1 +- this is no attention

# Drawn with these colours, shown with the page's own, so that light and dark both fit.
INK, MUTED, LINE = "#010101", "#020202", "#030303"
SERIES = ("#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04")
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line"} | {c: f"--c{n}" for n, c in enumerate(SERIES, 1)}

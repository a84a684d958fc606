# make setup | demo | test | lint | fast | floors | coverage | site | wheel | clean.  PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test long lint fast floors coverage site wheel clean
# Where the environment forbids Python to keep what it compiles, each of the tests' processes would compile torch again (2 s).
unexport PYTHONDONTWRITEBYTECODE

setup: $(VENV)/.ready

# torch comes first: an unpinned torch would bring gigabytes of CUDA wheels.  Python compiles what is imported, when it is:
# all that is installed would take twice as long.
# The last install also fetches NiiVue (hatch_build.py); without a network the case pages show still slices.
$(VENV)/.ready: pyproject.toml constraints.txt hatch_build.py package-lock.json
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "chiasm needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/chiasm demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/house.py --check

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --durations=20 -m 'not long'

long: lint  # what `make test` leaves out: the same again in another form
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile -m long

fast: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile -m 'not slow'

# The tests with the oldest versions that pyproject.toml admits, of which newer packages warn; torch is an exception, since
# CPU wheels of older ones are not on PyPI.
floors:
	rm -rf build/floors
	$(PYTHON) -m venv build/floors
	build/floors/bin/pip install --quiet --no-compile torch==2.13.0 uv
	build/floors/bin/uv pip install --quiet --python build/floors --resolution lowest-direct torch==2.13.0 -e '.[dev]'
	OMP_NUM_THREADS=1 build/floors/bin/pytest -n auto --dist loadfile -m 'not long' \
		-W default::DeprecationWarning -W default::PendingDeprecationWarning

# All tests once more, with the lines that none of them runs; half as slow again as make test.
coverage: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --cov=chiasm --cov-report=term:skip-covered

# The documentation as pages, in build/site: a link that leads nowhere stops it (tests/test_site.py builds it too).
site: setup
	$(BIN)/python -m sphinx --fail-on-warning --quiet -E -b html docs build/site
	@echo build/site/index.html

# What a stranger installs: the wheel alone, without what developers use.
wheel:
	rm -rf build/wheel build/bare build/demo
	$(PYTHON) -m pip wheel --quiet --no-deps -w build/wheel .
	$(PYTHON) -m venv build/bare
	build/bare/bin/pip install --quiet -c constraints.txt torch==2.13.0
	build/bare/bin/pip install --quiet -c constraints.txt build/wheel/*.whl
	build/bare/bin/chiasm demo --quick -o build/demo

clean:
	rm -rf $(VENV) build dist

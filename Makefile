# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast test-gpu lint clean

# Two files of tests at a time, or as many as WORKERS says, so that what a module prepares is prepared once. Each worker
# has one thread (tests/conftest.py).
WORKERS := 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

demo: .venv/.installed
	$(BIN)/spade-faiss demo

test: .venv/.installed-dev
	$(PYTEST)

# The inner loop: every room, without what takes seconds.
test-fast: .venv/.installed-dev
	$(PYTEST) -m "not slow"

# Those that need a GPU, one at a time.
test-gpu: .venv/.installed-dev
	$(BIN)/python -m pytest --need-gpu -m "gpu_torch or gpu_faiss"

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The stamps make pip run again only when the dependencies may have changed.
.venv/.installed: pyproject.toml | .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e .
	touch $@

.venv/.installed-dev: pyproject.toml | .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[test,lint]'
	touch $@ .venv/.installed

.venv:
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv spade-demo

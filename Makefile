# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/.installed
	$(BIN)/spade-faiss demo

test: .venv/.installed-dev
	$(BIN)/python -m pytest

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

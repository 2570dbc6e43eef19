# `make` alone prints what there is. Every target installs what it needs by itself.
PYTHON ?= python3
SCALE ?= tiny
VENV := .venv
PY := $(VENV)/bin/python
# Real pictures for the tests that use them; those tests skip where the folder is absent.
ifneq ($(wildcard ../shared/data),)
export FOMO_TEST_DATA ?= $(realpath ../shared/data)
endif

.DEFAULT_GOAL := help
.PHONY: help install update test bench soak lint reproduce clean

help: ## print this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 16

install: $(VENV)/installed ## create .venv and install what running needs

update: $(VENV)/installed ## the main job: install, then twenty updates of a tiny CLIP: 2 to 3 minutes on 2 CPU cores
	$(PY) fomo.py update --recipe recipes/merge.yaml --resume

test: $(VENV)/installed-dev ## the whole test suite
	$(PY) -m pytest -n 2 --dist loadfile

bench: $(VENV)/installed ## training speed beside open_clip's own loop: minutes
	$(PY) benchmarks/speed.py

soak: $(VENV)/installed-dev ## kill 85 runs at all kinds of instants and compare every bit; the world's properties: 18 minutes
	$(PY) tests/soak.py
	$(PY) -m pytest tests/properties.py

lint: $(VENV)/installed-dev ## ruff: mistakes and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

reproduce: $(VENV)/installed ## every study of the guide, three hours on 2 CPU cores; make reproduce SEEDS=0: one hour
	$(PY) fomo.py reproduce --scale $(SCALE) $(if $(SEEDS),--seeds $(SEEDS))

clean: ## remove the environment and the runs (the cache stays, see data cache --clear)
	rm -rf $(VENV) runs results .pytest_cache .ruff_cache

$(VENV)/installed: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(PY) -m pip install -r requirements-dev.txt
	touch $@

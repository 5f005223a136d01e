# `make train` and `make test` set up everything; they need only Python 3.11 or newer and make.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# Else each process compiles all tests, or all of isorun, anew.
export PYTHONDONTWRITEBYTECODE :=

# Tests of one file run in the same process. tests/conftest.py assigns the lanes. A process that dies
# is not replaced: pytest-xdist 3.8 can wait for ever for its tests then.
SHARE := --dist loadgroup --no-loadscope-reorder --max-worker-restart 0
SHARED := $(RUN) -m pytest -n 2 $(SHARE)
# Uses all cores alone.
ALONE := tests/invariants/test_chaos.py

.PHONY: help lock setup train test test-fast test-more test-all lint format chaos bench image sbom audit clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "isorun needs Python 3.11 or newer, not " + sys.version.split()[0] + "; choose another: make PYTHON=python3.11 ...")'
	@echo 'Installing isorun and its dependencies into $(VENV), which takes some minutes the first time.'
	$(PYTHON) -m venv $(VENV)
	@# Transformers is no extra that the tests need: it would raise the lower bounds that .ci/versions tries.
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' transformers
	touch $@

# What EXTRAS of the Dockerfile may name.
IMAGE_EXTRAS := deepspeed digits gcs mlflow plot s3 tokenizers tune

lock: ## update constraints.txt and docker/requirements.lock, except torch
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	grep '^torch==' constraints.txt > $(VENV)-lock/pins
	$(VENV)-lock/bin/uv pip compile --quiet --upgrade --python-version 3.11 --constraint $(VENV)-lock/pins \
		--find-links "$(or $(PIP_FIND_LINKS),.)" --no-header --no-annotate --no-emit-find-links \
		--all-extras pyproject.toml --output-file $(VENV)-lock/found
	(echo '# The exact versions with which the tests run; written by `make lock`.'; \
		sed -E '/^setuptools==/d; s/\+(cpu|cu[0-9]+)$$//' $(VENV)-lock/found) > constraints.txt
	(echo '# What the image installs, with hashes; written by `make lock`, read by docker/requirements.py.'; \
		$(VENV)-lock/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
		--constraint $(VENV)-lock/pins --no-header $(foreach extra,$(IMAGE_EXTRAS),--extra $(extra)) \
		pyproject.toml) > $(VENV)-lock/image
	mv $(VENV)-lock/image docker/requirements.lock
	rm -r $(VENV)-lock

setup: $(VENV)/ready ## create the virtual environment

train: setup ## train a small language model on text, two to five minutes on two cores
	$(RUN) -m train fit --config configs/text.yaml

test-fast: setup ## run the tests that start no process
	$(SHARED) -m fast

test: setup ## run the tests that need no server or container, about 10 minutes on two cores
	$(SHARED) -m 'not slow and not servers'

# One process mostly waits for containers, hence three.
test-more: setup ## run the other tests: full matrices, long runs, servers and containers
	$(RUN) -m pytest -m slow $(ALONE); alone=$$?; \
	$(RUN) -m pytest -n 3 $(SHARE) -m 'slow or servers' --ignore=$(ALONE) && exit $$alone

test-all: test test-more ## run all tests

lint: setup ## check style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

format: setup ## apply ruff's fixes and format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

chaos: setup ## start N runs with random faults and print a table (make chaos N=200)
	$(RUN) -m tests.support.chaos --runs $(or $(N),50) $(if $(SEED),--seed $(SEED))

bench: setup ## run the benchmarks (takes long)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(RUN) -m benchmarks.loop
	$(RUN) -m benchmarks.checkpoint
	$(RUN) -m benchmarks.startup
	$(RUN) -m benchmarks.agent
	$(RUN) -m benchmarks.scaling

# TARGET is cpu or cuda; BUILD_OPTIONS and RUN_OPTIONS are passed to Docker unchanged.
DOCKER ?= docker
TARGET ?= cpu
IMAGE ?= isorun:$(TARGET)
SBOM ?= sbom.json

image: ## build the container image (make image TARGET=cuda)
	DOCKER_BUILDKIT=1 $(DOCKER) build --file docker/Dockerfile --target $(TARGET) --tag $(IMAGE) \
		--build-arg SOURCE="$$(git remote get-url origin 2> /dev/null | sed 's#//[^/@]*@#//#')" \
		--build-arg REVISION="$$(git describe --always --abbrev=40 --dirty --exclude '*')" \
		$(BUILD_OPTIONS) .

sbom: ## list the packages of the image in CycloneDX format (sbom.json)
	$(DOCKER) run --rm $(RUN_OPTIONS) $(IMAGE) sh -c 'python -m venv /scratch/sbom && \
		/scratch/sbom/bin/pip install --quiet cyclonedx-bom==7.5.0 && \
		/scratch/sbom/bin/cyclonedx-py environment /opt/venv/bin/python' > $(SBOM)

audit: ## fail if a package of the image has a known vulnerability, or cannot be looked up
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	$(VENV)-audit/bin/python docker/audit.py docker/requirements.lock; code=$$?; \
		rm -r $(VENV)-audit; exit $$code

clean: ## remove the virtual environment and caches, but no runs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

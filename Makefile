# Every target sets up what it needs: a virtual environment in .venv with the package and its tools.
PYTHON ?= python3
DOCKER ?= docker
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
unexport PYTHONDONTWRITEBYTECODE  # keep compiled bytecode for the next process
parallel := --numprocesses=10 --dist=loadgroup --no-loadscope-reorder  # many tests wait most of the time
coverage := $(if $(CI)$(filter check,$(MAKECMDGOALS)),--cov --cov-fail-under=98)
VERSION = $(shell sed -n 's/^version = //p' setup.cfg)

.PHONY: help demo test pythons check lint types docs format bench faults lock audit base-image image image-steps wheel test-wheel emulator ct-mock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/worker ## watch sample notifications become Klaviyo profiles, events and catalog entries
	@$(BIN)/klaviyo-worker demo

test: $(VENV)/ready ## run all tests
	$(BIN)/pytest $(parallel) $(coverage)

pythons: ## run the tests on each installed Python from 3.11 to 3.14
	@for python in python3.11 python3.12 python3.13 python3.14; do \
		if $$python -c "" 2>/dev/null; then $(MAKE) test PYTHON=$$python || exit 1; \
		else echo "$$python is not installed: skipped"; fi; done

check: lint types test ## what CI runs: ruff, mypy --strict, all tests with branch coverage

lint: $(VENV)/ready ## ruff (rules and format), import layers, the glossary's words, generated docs, hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m tests.prose
	$(BIN)/python -m cogapp --check docs/*.md
	$(BIN)/hadolint Dockerfile

docs: $(VENV)/ready ## update the generated parts of the docs
	$(BIN)/python -m cogapp -r docs/*.md

types: $(VENV)/ready ## mypy --strict
	$(BIN)/mypy

format: $(VENV)/ready ## let ruff fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/ready ## messages per second, CPU and API calls per message, latency, memory: prints tables
	@$(BIN)/python -m benchmarks

faults: $(VENV)/ready ## the fate of every message in each fault scenario: prints a table
	@$(BIN)/python -m tests.faults

lock: $(VENV)/worker ## update requirements*.lock after a change of setup.cfg; UPGRADE=--upgrade: newest releases
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
		| $(compile) --extra push --extra sqs --extra servicebus --output-file requirements.lock setup.cfg -
	@$(compile) --constraint requirements.lock --extra dev --output-file requirements-dev.lock setup.cfg
	@echo 'uv==0.13.*' | $(compile) --output-file requirements-uv.lock -
	@echo python-qpid-proton | $(compile) --no-deps --output-file requirements-proton.lock -

compile = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes $(UPGRADE) --custom-compile-command 'make lock'

audit: $(VENV)/ready ## look up the locked packages in OSV, the database of known vulnerabilities (https://osv.dev)
	@$(BIN)/python -m tests.deploy.audit

base-image: ## replace the digest of the base image in the Dockerfile with the newest one
	@base=$$(sed -n 's/^ARG PYTHON_IMAGE=\([^@]*\).*/\1/p' Dockerfile) \
		&& digest=$$($(DOCKER) buildx imagetools inspect --format '{{.Manifest.Digest}}' "$$base") \
		&& { echo "$$digest" | grep -Eqx 'sha256:[0-9a-f]{64}' || { echo "no digest: $$digest"; exit 1; }; } \
		&& sed -i.old "s|^ARG PYTHON_IMAGE=.*|ARG PYTHON_IMAGE=$$base@$$digest|" Dockerfile && rm Dockerfile.old \
		&& echo "Base image: $$base@$$digest"

image: ## build the container image with docker (docs/image.md); PYTHON_IMAGE=…: on another base
	$(DOCKER) build $(if $(PYTHON_IMAGE),--build-arg PYTHON_IMAGE=$(PYTHON_IMAGE)) --build-arg VERSION=$(VERSION) \
		--build-arg REVISION=$$(git rev-parse HEAD) --build-arg CREATED=$$(date -u +%Y-%m-%dT%H:%M:%SZ) --tag klaviyo-worker:$(VERSION) .

image-steps: $(VENV)/ready ## run the Dockerfile's steps without docker, run the installed worker, write the SBOM into dist/
	@$(BIN)/python -m tests.deploy.image

wheel: $(VENV)/ready ## build the wheel into dist/
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

test-wheel: $(VENV)/ready ## run the acceptance tests against the wheel, installed as in the image
	@$(BIN)/python -m tests.deploy.wheel $(parallel)

emulator: ## start the Pub/Sub emulator of gcloud on port 8085 (docs/pubsub.md)
	@command -v gcloud >/dev/null || { echo "gcloud is not installed: https://cloud.google.com/sdk, then gcloud components install beta pubsub-emulator"; exit 1; }
	gcloud beta emulators pubsub start --project=demo --host-port=127.0.0.1:8085

ct-mock: $(VENV)/ready ## install a third-party commercetools mock with npm; its tests are skipped without it
	npm install --prefix $(VENV)/commercetools-mock --no-save --no-audit --no-fund --ignore-scripts @labdigital/commercetools-mock@4.4.0

clean: ## remove what the other targets made
	rm -rf .venv* build dist *.egg-info .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

# Stamps: `venv` has uv, `worker` also the package and what it needs, `ready` also the tools of the tests, `fauxqs` npm's
# emulator. uv installs several times faster than pip. pip is the fallback, because uv does not read pip's configuration.
install = $(BIN)/uv pip install --quiet --python $(BIN)/python $(1) 2>$(VENV)/uv.log || $(BIN)/pip install --quiet --no-compile $(1) \
	|| { echo "Neither uv nor pip could install $(2): check the network and the package index (PIP_INDEX_URL), then run make again"; exit 1; }

$(VENV)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) has no venv: install it (Debian: apt install python3-venv), then run make again"; exit 1; }
	@$(BIN)/pip install --quiet --no-compile --require-hashes --requirement requirements-uv.lock || true
	@touch $@

$(VENV)/worker: $(VENV)/venv setup.cfg pyproject.toml
	@echo "Installing klaviyo-worker into $(VENV) (less than a minute) ..."
	@$(call install,--editable .,klaviyo-worker)
	@touch $@

# Everything here comes from a lock with hashes, also the build tools: setuptools and, for python-qpid-proton, cffi.
$(VENV)/ready: $(VENV)/venv $(VENV)/fauxqs setup.cfg pyproject.toml requirements-dev.lock requirements-proton.lock
	@echo "Installing klaviyo-worker and the tools of the tests into $(VENV) (a minute or two) ..."
	@$(call install,--require-hashes --requirement requirements-dev.lock,the tools of the tests)
	@$(call install,--no-deps --no-build-isolation --editable .,klaviyo-worker)
	@$(BIN)/pip install --quiet --no-compile --no-build-isolation --require-hashes --requirement requirements-proton.lock >$(VENV)/proton.log 2>&1 \
		|| echo "python-qpid-proton, which needs a C compiler, could not be installed: the Service Bus tests are skipped"
	@$(BIN)/pytest --collect-only --quiet >/dev/null || true  # compiles the bytecode once instead of in each process
	@touch $(VENV)/worker $@

$(VENV)/fauxqs:
	@mkdir -p $(VENV)
	@npm install --prefix $(VENV) --no-save --no-audit --no-fund --ignore-scripts --loglevel=error fauxqs@1.9.2 >$(VENV)/npm.log 2>&1 \
		|| echo "npm could not install fauxqs, an emulator of AWS SQS: the SQS load tests are skipped"
	@touch $@

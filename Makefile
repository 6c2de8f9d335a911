# make run    the main job, start to end: data, model, training, test, results
# make test   every check: notebooks, tests, drift, wheel, site
# make lab    JupyterLab on the review
# make docs   the site, served on localhost
# make prepare  export the library, clean the notebooks, write README.md and requirements.lock: before a commit
# Each sets up .venv by itself. PYTHON names another interpreter for a new .venv, PORT another port: make run PYTHON=python3.12

PYTHON ?= python3
PORT   ?= 4200
BIN    := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONWARNINGS ?= ignore:::debugpy

.PHONY: run test lab docs site prepare clean help
.DEFAULT_GOAL := help

help:
	@sed -nE 's/^# ?//p; /^$$/q' Makefile

# .venv is complete when this stamp is there; an interrupted installation leaves none, and is done again
.venv/.installed: requirements.lock settings.ini setup.py
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "error: $$($(PYTHON) --version) is too old: Python 3.11 or newer is needed; name one as in: make run PYTHON=python3.12" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

# with CIFAR-10 at hand the same recipe has two epochs on it, otherwise all of its epochs on the embedded shapes
CIFAR_CHANGES := --data.data=cifar10 --data.batch_size=125 --data.augment=student --trainer.max_epochs=2
run: .venv/.installed
	@rm -rf results/run
	@if [ -n "$$FISHNET_DATA" ] || [ -e data/cifar-10-batches-py ]; then changes="$(CIFAR_CHANGES)"; fishnet-nb data --sheet results/run-images.png; \
	else echo "CIFAR-10 is not in data/, so this runs on the embedded synthetic shapes."; fishnet-nb data --shapes --sheet results/run-images.png; fi && \
	fishnet-nb summary fishnet73 --widths 16 32 64 --tail 1 1 2 --k 4 && \
	fishnet-nb fit quick --name run $$changes && \
	mv results/run-images.png results/run/images.png && \
	fishnet-nb test results/run

# two processes with one thread each: with more threads than cores they mostly wait for one another
test: .venv/.installed
	OMP_NUM_THREADS=1 nbdev_test --n_workers 2 --timing
	OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 15 tests

lab: .venv/.installed
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) nbs/00_review.ipynb

# nbdev_proc_nbs would install Quarto first, as root; this is the rest of it, without the other names that nbdev gives the pages
site: .venv/.installed
	@$(BIN)/python -c 'from nbdev.serve import proc_nbs; proc_nbs()'
	@sed -i.bak '/"output-file: /d' _proc/*.ipynb && rm _proc/*.bak
	@$(BIN)/smalldocs render --quiet _proc
	@rm -rf _docs && mv _proc/_docs _docs

docs: site
	@echo "The site is at http://127.0.0.1:$(PORT); stop it by Ctrl-C."
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _docs $(PORT)

prepare: .venv/.installed
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tests/project.py
	sed -nE '/^(dev_)?requirements = /s/[^=]*= //p' settings.ini | tr ' ' '\n' | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-emit-index-url --no-annotate - -o requirements.lock

clean:
	rm -rf _proc _docs build dist artifacts results/run

# make install | demo | demo-tscir | demo-dpo | demo-wrf | demo-search | study | test | lint | format | docs | bench | release;
# PYTHON=python3.13 chooses the interpreter,
# VENV=folder where it is installed, WITH='transformers<5' what else pip has to install,
# CIR_DATA=folder that holds fashionIQ_dataset/ with the real annotation files, for bench.
PYTHON ?= python3
VENV ?= .venv
CIR_DATA ?= ../shared/data
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist worksteal

BIN := $(VENV)/bin
# The checkout's own path counts: a cached environment may hold the editable install of another checkout.
STATE := $(shell { echo "$(CURDIR) $(WITH)"; cat setup.cfg setup.py pyproject.toml lavis_without_pins/*; } | cksum | tr ' ' -)
INSTALLED := $(VENV)/.installed-$(STATE)
TESTABLE := $(VENV)/.testable-$(STATE)

.PHONY: install demo demo-tscir demo-dpo demo-wrf demo-search study test lint format docs bench release

install: $(INSTALLED)

demo: install
	$(BIN)/python -m lavis.train --cfg-path projects/wrf4cir/demo.yaml

demo-tscir: install
	$(BIN)/python benchmarks/tscir_ladder.py --work output/tscir/demo

demo-dpo: install
	$(BIN)/python benchmarks/dpo_ladder.py --work output/retrieval_dpo/demo --clip run.max_iters=300 \
		--stage-one run.max_epoch=5 --fused run.max_epoch=2

demo-wrf: install
	$(BIN)/python -W ignore benchmarks/wrf_study.py --demo

# It goes on from the rows of docs/results/wrf_study.csv; STUDY_ARGS='--jobs 2 --only main/*' and the like.
study: install
	$(BIN)/python -W ignore benchmarks/wrf_study.py $(STUDY_ARGS)

demo-search: install
	@ls output/wrf4cir/demo/*/checkpoint_best.pth > /dev/null 2>&1 || $(MAKE) demo
	$(BIN)/python benchmarks/search_demo.py --work output/search/demo
	$(BIN)/lavis-cir serve output/search/demo/index --port 0

test: $(TESTABLE)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(TESTABLE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(TESTABLE)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(TESTABLE)
	PYTHONPATH=docs NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "The site is in output/site/: open index.html; its search needs python -m http.server -d output/site."

# It builds dist/, installs it in empty environments, and runs the tests on the Pythons that CI leaves out.
release:
	.ci/release

bench: $(INSTALLED)
	$(BIN)/python benchmarks/perturbation_cost.py
	$(BIN)/python benchmarks/default_training_cost.py
	$(BIN)/python benchmarks/tscir_step_cost.py
	$(BIN)/python benchmarks/triplets_full_size.py
	$(BIN)/python benchmarks/validation_metrics.py
	$(BIN)/python benchmarks/validation_metrics.py --features 32 --rounds 1
	$(BIN)/python benchmarks/circo_full_size.py
	$(BIN)/python benchmarks/negatives_full_size.py
	$(BIN)/python benchmarks/check_full_size.py
	$(BIN)/python benchmarks/command_start.py
	$(BIN)/python benchmarks/evaluation_cost.py
	$(BIN)/python benchmarks/busy_cores.py
	$(BIN)/python benchmarks/search_full_size.py
	$(BIN)/python benchmarks/serve_load.py
	@if [ -d "$(CIR_DATA)/fashionIQ_dataset/captions" ]; then set -x; \
		$(BIN)/python benchmarks/fashioniq_full_size.py --annotations "$(CIR_DATA)/fashionIQ_dataset"; \
	else echo "benchmarks/fashioniq_full_size.py was left out: no fashionIQ_dataset/captions in $(CIR_DATA); set CIR_DATA."; fi

$(INSTALLED): EXTRAS := cpu,serve
$(TESTABLE): EXTRAS := cpu,serve,qdrant,test,docs

$(INSTALLED) $(TESTABLE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9) and "Python >= 3.9 is needed, $(PYTHON) is older; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.installed-* $(VENV)/.testable-*
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# Python >= 3.12 cannot meet LAVIS's own pins, and takes LAVIS without them.
	lavis=$$($(BIN)/python -c 'import sys; print("./lavis_without_pins" if sys.version_info >= (3, 12) else "")'); \
		$(BIN)/python -m pip install --editable '.[$(EXTRAS)]' $$lavis $(if $(WITH),'$(WITH)')
	@touch $(INSTALLED) $@

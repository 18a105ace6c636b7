# make reproduce | test | test-all | bench | docs | lab | readme | outputs | clean-nbs    each sets up .venv by itself
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PROFILE ?= demo
PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.13,$(shell python$(v) -c 'import sys; print(sys.executable)' 2>/dev/null)) \
	$(shell python3 -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14); print(sys.executable)' 2>/dev/null))
VENV ?= .venv
BIN := $(VENV)/bin
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
RUN := $(BIN)/gemmgan reproduce --profile $(PROFILE) $(if $(HER2ST),--set 'cohort.folder=$(HER2ST)') $(if $(PRESET),--set cohort.preset=$(PRESET)) \
	$(foreach s,$(SET),--set '$(s)') $(FLAGS)

.PHONY: reproduce plan test test-all bench docs lab readme outputs clean-nbs

reproduce: $(VENV)/ready
	@$(RUN)

plan: $(VENV)/ready
	@$(subst gemmgan reproduce,gemmgan plan,$(RUN))

test: $(VENV)/ready
	@echo "1/3 ruff on the exported library"; $(BIN)/ruff check gemmgan_nb
	@echo "2/3 every notebook"; OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2 --timing | $(BIN)/python workflow/chapter_times.py $(TOO_SLOW)
	@echo "3/3 pytest"; OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: TOO_SLOW = --fail
test-all: test
	@$(BIN)/pytest -m 'slow or not slow'

bench: $(VENV)/ready
	@mkdir -p runs/bench && $(BIN)/papermill --log-output --no-progress-bar nbs/27_benchmarks.ipynb runs/bench/executed.ipynb -p scale paper -p out runs/bench $(if $(SLIDE),-p slide '$(abspath $(SLIDE))')

docs: $(VENV)/ready
	@$(BIN)/python workflow/docs/build.py

lab: $(VENV)/ready
	@$(BIN)/jupyter lab nbs

readme: $(VENV)/ready
	@$(BIN)/jupyter nbconvert --execute --no-input --to markdown --output-dir . --output README nbs/index.ipynb

outputs: $(VENV)/ready
	@OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2 --save && $(BIN)/python workflow/shrink_outputs.py && $(BIN)/nbdev-clean

clean-nbs: $(VENV)/ready
	@$(BIN)/nbdev-export && $(BIN)/nbdev-clean

$(VENV)/ready: settings.ini setup.py pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11, 3.12 or 3.13 is needed. On Debian or Ubuntu: sudo apt-get install python3 python3-venv"; exit 1; fi
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv module is missing. On Debian or Ubuntu: sudo apt-get install $$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; exit 1; }
	@command -v git >/dev/null || { echo "git is missing. On Debian or Ubuntu: sudo apt-get install git"; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON) (about 5 GB, some minutes; CPU=1 takes CPU-only builds of torch)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(if $(CPU),@$(BIN)/pip install -q --progress-bar off -c constraints.txt torch torchvision --index-url $(CPU_INDEX))
	@$(BIN)/pip install --progress-bar off -c constraints.txt -e '.[dev,docs]' | awk '/^(Collecting|Installing|Successfully)/ {print substr($$0, 1, 100); fflush()}'
	@$(BIN)/pip check && touch $@
